"""All tests run on eight simulated CPU devices, in float32, without a network."""

import jax
import pytest
from absl import logging

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Whatever an earlier test's run of `ebt train` has silenced."""
    logging.set_verbosity(logging.WARNING)
