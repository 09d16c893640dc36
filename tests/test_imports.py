"""CPU time of importing the library."""

import resource
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_importing_the_library_takes_at_most_a_quarter_more_cpu_time_than_torch() -> None:
    ours = "import torch; from tailora import LoRAConfig, LoRALayer, LoRAModel"
    with_tailora, torch_alone = [], []
    for _ in range(8):  # the other test worker may spoil some measurements
        with_tailora.append(cpu_seconds(ours))
        torch_alone.append(cpu_seconds("import torch"))
        if min(with_tailora) <= 1.25 * min(torch_alone):
            return
    pytest.fail(f"seconds with tailora: {with_tailora}, torch alone: {torch_alone}")


def cpu_seconds(code: str) -> float:
    """Returns the CPU seconds of a new interpreter that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
