"""Two processes on one machine: the adapter, the held-out loss and the files are those of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tailora.train.config import TrainConfig
from tailora.train.run_log import write_settings
from tailora.train.trainer import run

LONGEST = 300  # s; some 15 on an idle machine
WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from tailora.train import kernel_choice
from tailora.train.config import TrainConfig
from tailora.train.trainer import Trainer

torch.distributed.init_process_group("gloo")  # which the runs use, and leave
if torch.distributed.get_rank() == 1:
    kernel_choice.obstacle_to_compiling = lambda *_: "the second machine has no compiler"
for settings in json.loads(sys.argv[1]):
    trainer = Trainer(TrainConfig(**settings))
    trainer.train()
    for buffer in trainer.buffers:
        of_first = buffer.parameter.detach().clone()
        torch.distributed.broadcast(of_first, src=0)
        assert torch.equal(of_first, buffer.parameter)
"""
SHARED = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "eval_steps": 3, "save_steps": 3}  # 8 steps
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"method": "full", "learning_rate": 1e-3, "r": 16},
}


class TwoRanks(NamedTuple):
    folder: Path  # the output of each case is in a folder of its name
    process: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def two_ranks(make_settings: Any, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """One start of two processes, which train every case, and compare what they trained."""
    folder = tmp_path_factory.mktemp("ranks")
    configs = [make_settings(output_dir=str(folder / name), **SHARED, **changes) for name, changes in CASES.items()]
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # on a free port
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(script), json.dumps([config.model_dump(exclude_unset=True) for config in configs])]
    process = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    return TwoRanks(folder, process)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_does(case: str, two_ranks: TwoRanks, settings: Any) -> None:
    assert two_ranks.process.returncode == 0, two_ranks.process.stderr
    one, two = settings(gradient_accumulation_steps=2, **SHARED, **CASES[case]), two_ranks.folder / case
    result = run(one)
    name = "model/model.safetensors" if case == "full" else "adapter/adapter_model.safetensors"
    weights = [load_file(folder / name) for folder in (Path(one.output_dir), two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    record = json.loads((two / "run.json").read_text())
    assert (record["processes"], record["finished"]) == (2, True)
    assert "compiled layers: the second machine has no compiler" in record["kernels"]  # on the first neither
    for name in ("steps", "train_tokens", "supervised_tokens", "best_step"):
        assert record["result"][name] == getattr(result, name)
    assert record["result"]["eval_loss_after"] == pytest.approx(result.eval_loss_after, abs=1e-6)
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, result.steps + 1))
    assert {path.name for path in (two / "checkpoint-6").iterdir()} >= {"random-0.safetensors", "random-1.safetensors"}


FAILING = """
import os, signal, sys
import tailora.train.trainer as trainer
from tailora.errors import DataError
from tailora.train import run_log
from tailora.cli.__main__ import run
step = trainer.Trainer.step
case = sys.argv.pop()

def failing_step(self, *arguments):
    if self.accelerator.process_index == 1:
        if case == "a step":
            raise DataError("row 7 is broken")
        if case == "a signal" and self.state.step == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return step(self, *arguments)

def broken(*_, **__):
    raise DataError("row 7 is broken")

trainer.Trainer.step = failing_step
if case == "before loading":  # in the main process alone
    run_log.check_run_folder = broken
run()
"""


def ended_by(case: str, config: TrainConfig, folder: Path) -> tuple[list[int], str]:
    """Starts two processes; returns their exit codes, and what they wrote to stderr."""
    write_settings(folder, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", FAILING, "train", "--config", str(folder / "config.yaml"), case]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = "".join(process.communicate(timeout=LONGEST)[1] for process in processes)
    return [process.returncode for process in processes], told


@pytest.mark.slow
@pytest.mark.parametrize("case", ["before loading", "a step"])
def test_a_failure_of_one_process_ends_all_with_one_message_and_its_exit_code(
    case: str, settings: Any, tmp_path: Path
) -> None:
    codes, told = ended_by(case, settings(max_steps=2, device="cpu"), tmp_path)
    assert codes == [2, 2], told
    assert told.count("error: row 7 is broken") == 1
    assert told.count("error:") == 1
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(settings: Any, tmp_path: Path) -> None:
    config = settings(max_steps=6, device="cpu")
    codes, told = ended_by("a signal", config, tmp_path)
    assert codes == [130, 130], told
    (folder,) = Path(config.output_dir).glob("checkpoint-*")
    assert folder.name == "checkpoint-2"  # the signal came in step 1, and step 2 told the other process
