"""EBT-JAX: Energy-Based Transformers in JAX.

`ebt_jax.refine`, `ebt_jax.objectives` are pure functions of any energy;
`ebt_jax.models`, `data`, `training` and `evaluation` are the rooms around them, and
`ebt_jax.interop` reads and writes published PyTorch checkpoints.
"""
