"""Suite-wide settings."""

import pytest
import torch
from hypothesis import settings

# Reproducible in CI, and no deadline: the first torch call is slow.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed_torch():
    torch.manual_seed(0)
