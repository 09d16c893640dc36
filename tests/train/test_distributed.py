"""Two processes on one machine: the gradient, the held-out loss and the files are those of one process."""

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
from torch import nn
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
from tailora import LoRAConfig, LoRAModel
from tailora.kernels.flat_parameters import Group, check_views, flattened
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

torch.distributed.init_process_group("gloo")  # which the run uses, and ends
rank = torch.distributed.get_rank()
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()  # another order of sums shows less
model = LoRAModel(base, LoRAConfig(r=2, target_modules=["0", "2"]))
for path in ("0", "2"):
    nn.init.normal_(model.lora_layers[path].lora_B)
batches = torch.randn(2, 3, 4, 7).double()  # (ranks, micro-batches, rows, inputs)
for batch in batches.flatten(0, 1):
    (model(batch).square().sum() / 2).backward()  # DDP takes the mean over ranks
expected = {name: parameter.grad.clone() for name, parameter in model.lora_layers.named_parameters()}
with flattened([Group(dict(model.lora_layers.named_parameters()))]) as (buffer,):
    parallel = DistributedDataParallel(model)
    for again in range(2):
        *first, last = batches[rank]
        with parallel.no_sync():
            for batch in first:
                parallel(batch).square().sum().backward()
        parallel(last).square().sum().backward()
        check_views([buffer])
        for name, gradient in expected.items():
            torch.testing.assert_close(buffer.view(name, buffer.gradient), gradient)
        buffer.gradient.zero_()
print(f"gradients of rank {rank} agree")
torch.distributed.barrier()  # gloo must be idle when the reducer is freed
run(TrainConfig(**json.loads(sys.argv[1])))
"""
SHARED = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "eval_steps": 3, "save_steps": 3}


class TwoRanks(NamedTuple):
    config: TrainConfig
    process: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def two_ranks(make_settings: Any, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """One start of two processes, which compare gradients in a flat buffer and then train."""
    folder = tmp_path_factory.mktemp("ranks")
    config = make_settings(output_dir=str(folder / "out"), **SHARED)  # 8 batches an epoch, 4 steps
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # on a free port
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(script), config.model_dump_json()]
    process = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    return TwoRanks(config, process)


@pytest.mark.slow
def test_two_ranks_add_up_their_gradients_in_the_flat_buffer(two_ranks: TwoRanks) -> None:
    assert two_ranks.process.returncode == 0, two_ranks.process.stderr
    assert [f"gradients of rank {rank} agree" in two_ranks.process.stdout for rank in range(2)] == [True, True]


@pytest.mark.slow
def test_two_ranks_train_the_adapter_that_one_does(two_ranks: TwoRanks, settings: Any) -> None:
    assert two_ranks.process.returncode == 0, two_ranks.process.stderr
    one, two = settings(gradient_accumulation_steps=2, **SHARED), two_ranks.config
    result = run(one)
    weights = [load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors") for config in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4)
    record = json.loads((Path(two.output_dir) / "run.json").read_text())
    assert (record["processes"], record["finished"]) == (2, True)
    for name in ("steps", "train_tokens", "supervised_tokens", "best_step"):
        assert record["result"][name] == getattr(result, name)
    assert record["result"]["eval_loss_after"] == pytest.approx(result.eval_loss_after, abs=1e-4)
    lines = [json.loads(line) for line in (Path(two.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, result.steps + 1))
    assert {path.name for path in (Path(two.output_dir) / "checkpoint-6").iterdir()} >= {
        "random-0.safetensors",
        "random-1.safetensors",
    }


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
