"""Commands that run in the test's own process leave its devices as they are."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _devices():
    """The program chooses the number of CPU devices where JAX has not started before."""
    jax.devices()
