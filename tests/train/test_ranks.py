"""Two processes on one machine: the gradient, the held-out loss and the files are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tailora.train.config import TrainConfig
from tailora.train.trainer import run

LONGEST = 300  # s; some 15 on an idle machine
WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from tailora.train.config import TrainConfig
from tailora.train.trainer import run
result = run(TrainConfig(**json.loads(sys.argv[1])))
print(json.dumps(result.to_dict()))
"""


def on_two_ranks(config: TrainConfig, folder: Path) -> None:
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # on a free port
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(script), config.model_dump_json()]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    assert done.returncode == 0, done.stderr


def test_two_ranks_train_the_adapter_that_one_does(settings: Any, tmp_path: Path) -> None:
    shared = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "eval_steps": 3, "save_steps": 3}
    one = settings(output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2, **shared)
    two = settings(output_dir=str(tmp_path / "two"), **shared)  # 8 batches an epoch, 4 steps
    result = run(one)
    on_two_ranks(two, tmp_path)
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
    assert {path.name for path in (tmp_path / "two" / "checkpoint-6").iterdir()} >= {
        "random-0.safetensors",
        "random-1.safetensors",
    }
