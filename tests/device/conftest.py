"""Tests on the pretend accelerator."""

import pretend_accelerator
import pytest
import torch
from tiny_run import data_file, make_settings, model_folder, settings  # noqa: F401


@pytest.fixture(scope="session")
def device() -> torch.device:
    return pretend_accelerator.install_or_skip()
