"""All tests run on eight simulated CPU devices, in float32, without a network.

Programs are compiled without optimisation, here and in the processes that tests start:
nearly all of the time of these tests goes into compiling programs that run once.
"""

import os

import jax
import pytest
from absl import logging

# Read when the first device is asked for.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Whatever an earlier test's run of `ebt train` has silenced."""
    logging.set_verbosity(logging.WARNING)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """After each file: a program keeps three of the 65,530 memory maps of a process.

    At that number, which is Linux's, no thread starts any more.
    """
    yield
    jax.clear_caches()
