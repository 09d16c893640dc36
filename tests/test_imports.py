"""CPU time of importing the library."""

import resource
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_importing_the_library_takes_at_most_a_quarter_more_cpu_time_than_torch() -> None:
    ours = "import torch; from tailora import LoRAConfig, LoRALayer, LoRAModel"
    pairs = [(cpu_seconds(ours), cpu_seconds("import torch")) for _ in range(3)]
    assert min(mine for mine, _ in pairs) <= 1.25 * min(alone for _, alone in pairs)


def cpu_seconds(code: str) -> float:
    """Returns the CPU seconds of a new interpreter that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
