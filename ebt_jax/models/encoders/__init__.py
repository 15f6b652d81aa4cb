"""Encoders of images, frames and captions, and the weights they are read from.

`patch` fits its own principal components and needs no file. `vae`, `dinov2` and
`clip_text` take published weights from a path that the user gives, `clip_bpe` the
public vocabulary; each loads a NamedTuple of parameters and pure functions of them.

In float32 they agree with the reference implementations within 1e-4. Accelerators may
multiply in less: set `jax.default_matmul_precision("highest")` where that matters.
"""
