"""Tests on the pretend accelerator."""

import pretend_accelerator
import pytest
import torch
from tiny_run import data_file, make_settings, model_folder, settings  # noqa: F401


@pytest.fixture(scope="session")
def device() -> torch.device:
    if lacks := pretend_accelerator.missing():
        pytest.skip(f"the pretend accelerator cannot be built here: this machine lacks {lacks}")
    return pretend_accelerator.install()
