"""Each test here runs on a card with `-m gpu`, and on the pretend accelerator with `-m device`."""

import pretend_accelerator
import pytest
import torch
from tiny_run import data_file, make_settings, model_folder, one_thread, settings  # noqa: F401

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PRETEND = pytest.param("pretend", marks=pytest.mark.device)


def found(name: str, cards: int = 1) -> torch.device:
    if name == "pretend":
        return pretend_accelerator.install_or_skip()
    if name == "cuda" and torch.cuda.device_count() < cards:
        pytest.skip(f"needs {cards} GPUs, found {torch.cuda.device_count()}")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@pytest.fixture(params=[CUDA, PRETEND])
def device(request: pytest.FixtureRequest) -> torch.device:
    return found(request.param)


@pytest.fixture(params=[CUDA, "cpu"])
def cuda_or_cpu(request: pytest.FixtureRequest) -> torch.device:
    """For what the pretend accelerator lacks: there the test runs on the CPU, by default."""
    return found(request.param)


@pytest.fixture(params=[CUDA, pytest.param("cpu", marks=pytest.mark.exhaustive)])
def two_cards(request: pytest.FixtureRequest) -> torch.device:
    return found(request.param, cards=2)
