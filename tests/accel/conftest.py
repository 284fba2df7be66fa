"""What the tests of fast networks share."""

import pytest

from guided_diffusion.accel import build, cpu_kernels


@pytest.fixture
def kernels():
    """The built kernels; without a compiler a test that asks for them is skipped."""
    try:
        return cpu_kernels.load()
    except build.KernelError as error:
        pytest.skip(str(error))
