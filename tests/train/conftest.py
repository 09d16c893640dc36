"""Settings of tiny runs, in one thread."""

from collections.abc import Iterator

import pytest
import torch
from tiny_run import data_file, make_settings, model_folder, settings  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, and no fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
