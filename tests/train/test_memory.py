import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from limits import give_back_freed_memory
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tailora.errors import MemoryLimitError, is_out_of_memory
from tailora.train import memory
from tailora.train.memory import (
    available_bytes,
    format_bytes,
    peak_bytes,
    reset_peak,
    used_bytes,
)

CPU = torch.device("cpu")

STARVED = """
import json, resource, sys
import psutil, torch
torch.set_num_threads(1)
from tailora.train.config import TrainConfig
from tailora.train.events import Prepared
from tailora.train.trainer import run
from tailora.errors import MemoryLimitError, is_out_of_memory
def starve(event):
    if isinstance(event, Prepared):  # after the estimate was found to fit
        limit = psutil.Process().memory_info().vms + 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    run(TrainConfig(**json.loads(sys.argv[1])), on_event=starve)
except MemoryLimitError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (MemoryLimitError("said already"), False),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_running_out_in_training_names_cause_and_remedies(settings: Any, model_folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "wide")
    rows = [{"prompt": f"one {i}", "completion": "red blue green " * 60} for i in range(24)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(model=str(tmp_path / "wide"), data=str(data), per_device_train_batch_size=8, validation_split=0)
    command = [sys.executable, "-c", STARVED, config.model_dump_json()]
    one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # more of them hold memory in reserve
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=one_arena)
    assert process.returncode == 0, process.stderr
    assert "out of memory while training" in process.stdout
    assert "allocate" in process.stdout.splitlines()[0]
    assert "what helps:\n  - --per-device-train-batch-size 4 --gradient-accumulation-steps 2\n" in process.stdout
    assert process.stdout.rstrip().endswith("\n  - a smaller --model")


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("lines", "mount", "names"), [("0::{}", "", V2), ("4:cpu:/\n3:hugetlb,memory:{}", "memory", V1)]
)
@pytest.mark.parametrize("tightest", ["outer", "outer/inner"])
def test_the_smallest_limit_of_nested_control_groups_counts(
    lines: str, mount: str, names: tuple[str, str, str], tightest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used, droppable = names
    for path in ("", "outer", "outer/inner"):
        most = "9000" if path == tightest else {V2: "max", V1: "9223372036854771712"}[names]
        stat = f"anon 1\n{droppable} 500\n"
        write_group(tmp_path / mount / path, {limit: f"{most}\n", used: "7000\n", "memory.stat": stat})
    (tmp_path / "of this process").write_text(lines.format("/outer/inner") + "\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "of this process")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert available_bytes(CPU) == 2500


def test_the_peak_grows_by_what_is_allocated_beyond_it() -> None:
    give_back_freed_memory()
    before = peak_bytes(CPU)
    gap = before - used_bytes(CPU)
    block = torch.ones((gap + 200_000_000) // 4)
    assert block.nbytes > gap
    assert 0.15e9 < peak_bytes(CPU) - before < 0.25e9
    assert 0 < available_bytes(CPU) < 2**50


def test_apples_gpu_shares_the_systems_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mps, free = torch.device("mps"), 4_000
    sizes = {"current_allocated_memory": 1_000, "driver_allocated_memory": 3_000, "recommended_max_memory": 10_000}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.mps, name, lambda size=size: size)
    emptied: list[bool] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert (used_bytes(mps), peak_bytes(mps)) == (1_000, 3_000)
    assert available_bytes(mps) == free + 2_000  # what torch holds and does not use can be used, too
    free = 20_000
    assert available_bytes(mps) == 9_000
    reset_peak(mps)
    assert emptied


def test_where_the_driver_does_not_tell_it_is_what_torch_has_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> None:
        raise RuntimeError("The device does not support querying for available free memory")

    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda _: 500)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda _: 300)
    monkeypatch.setattr(torch.xpu, "mem_get_info", fail)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(total_memory=1_000))
    assert available_bytes(torch.device("xpu", 0)) == 700


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 bytes"), (1234, "1.23 kB"), (999_600, "1 MB"), (5e6, "5 MB"), (2.5e9, "2.5 GB"), (3e12, "3,000 GB")],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


FAULTS = """
import os, resource, torch
from tailora.train.memory import keep_freed_memory
def faults():
    for _ in range(20):
        blocks = [bytearray(2**22) for _ in range(8)]  # 32 MB, zeroed
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for name in (None, "MALLOC_TRIM_THRESHOLD_"):
    if os.fork() == 0:  # importing takes far longer than all else
        os.environ.update({} if name is None else {name: "1000000"})
        keep_freed_memory(torch.device("cpu"))
        before = faults()
        print(faults() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_freed_memory_is_kept_unless_the_environment_sets_malloc() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    by_default, as_set = map(int, run.stdout.split())
    assert by_default < 1000 <= as_set
