"""The limits for tests with hostile input notice what they are for; two processes of tests share two cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import CLEAR, limited

from tailora.train.memory import keep_freed_memory

linux = pytest.mark.skipif(not CLEAR.exists(), reason="only Linux tells the peak of a block")
HANG = "import limits, time\nwith limits.limited(hang_seconds=0.2):\n    time.sleep(60)\n"


@linux
def test_memory_of_torch_counts_even_if_it_is_free_again() -> None:
    with limited(most_bytes=100_000_000):
        torch.ones(10_000_000)  # 40 MB
    with pytest.raises(AssertionError, match="the limit is 100 MB"), limited(most_bytes=100_000_000):
        torch.ones(50_000_000)


@linux
def test_memory_that_malloc_has_kept_counts_again() -> None:
    keep_freed_memory(torch.device("cpu"))
    blocks = [torch.ones(2_000_000) for _ in range(25)]  # 8 MB each, which malloc keeps when they are free
    del blocks
    with pytest.raises(AssertionError, match="the limit is 100 MB"), limited(most_bytes=100_000_000):
        torch.ones(40_000_000)


def test_a_hang_ends_the_process_and_shows_where_it_is() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANG], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 1
    assert 'File "<string>", line 3' in ended.stderr


def test_one_of_two_processes_computes_in_one_thread() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a process alone uses all cores
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
