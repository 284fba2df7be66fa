import pytest
from train_cases import tiny_conf


@pytest.fixture
def conf(tmp_path):
    """The smallest training, with its pictures."""
    return tiny_conf(tmp_path)
