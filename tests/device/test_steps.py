"""Steps on a device: the host waits once a step, whatever is in it, and what it reads late changes nothing."""

import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_accelerator import build, counted
from runs import adapter, losses, run_and_resume
from tiny import chat_model

from tailora.core.config import LoRAConfig
from tailora.data.dataset import Example, Examples
from tailora.errors import DivergedError
from tailora.formats.run_folder import checkpoints_in
from tailora.kernels.loss import FROZEN
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.events import Evaluated, Event, Stepped
from tailora.train.loss import BatchLayout, evaluate
from tailora.train.step import Step
from tailora.train.trainer import Trainer, run

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("device")]


@pytest.fixture(scope="module")
def deep_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in `settings` with four layers instead of two."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("deep"), dirs_exist_ok=True))
    chat_model(vocab_size=320, intermediate_size=48, initializer_range=0.2, num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(make_settings: Any, deep_model: Path, tmp_path: Path) -> Any:
    def make(layers: int = 2, **changes: Any) -> TrainConfig:
        defaults = {"output_dir": str(tmp_path / "out"), "validation_split": 0, "max_steps": 5}
        deep = {"model": str(deep_model)} if layers == 4 else {}
        return make_settings(**{**defaults, "per_device_train_batch_size": 2, **deep, **changes})

    return make


CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "four micro-batches": {"gradient_accumulation_steps": 4},
    "four layers": {"layers": 4},
    "one document": {"per_device_train_batch_size": 1},
    "eight documents": {"per_device_train_batch_size": 8},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "own logits": {"fast": "off"},
    "padded": {"packing": "off"},
    "padded, four micro-batches": {"packing": "off", "gradient_accumulation_steps": 4},
    "padded, own logits": {"packing": "off", "fast": "off"},
    "dropout and DoRA": {"lora_dropout": 0.1, "use_dora": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "full": {"method": "full", "r": 16},  # the default, which it does not use
    "float16": {"dtype": "float16"},
    "clipped": {"max_grad_norm": 1e-3},
}


class Waits:
    """A listener that counts how often the host waits between two reports of a step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.last: Counter[str] | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            now = Counter(build().synchronisations())
            if self.last is not None:
                self.steps.append(now - self.last)
            self.last = now


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_a_step(settings: Any, case: str) -> None:
    waits, config = Waits(), settings(**CASES[case])
    run(config, waits)
    assert len(waits.steps) == config.max_steps - 1
    assert all(step == {"event": 1} for step in waits.steps), waits.steps


def test_an_evaluation_waits_once_for_many_batches(device: torch.device) -> None:
    model = LoRAModel(chat_model().to(device), LoRAConfig(r=4))
    ids = np.arange(20, dtype=np.int32)
    held_out = Examples.of([Example.of_text(ids)] * 8)
    for packed in (True, False):
        with counted() as counts:
            evaluate(model, held_out, layout=BatchLayout(packed, FROZEN, 0), token_budget=40)
        assert counts.synchronisations.total() == 1


@pytest.mark.parametrize("case", [case for case in CASES if "dtype" not in CASES[case]])  # 16 bits round too much
def test_a_run_is_that_of_a_cpu(settings: Any, tmp_path: Path, case: str) -> None:
    changes = {"validation_split": 0.2, "eval_steps": 2, **CASES[case], "lora_dropout": 0.0}
    here, there = (settings(**changes, device=name, output_dir=str(tmp_path / name)) for name in ("auto", "cpu"))
    reports: list[Event] = []
    run(here, reports.append)
    run(there)
    ours, theirs = losses(here), losses(there)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-4)
    steps = [event.step for event in reports if isinstance(event, Stepped)]
    assert steps == list(range(1, here.max_steps + 1))
    done = [(type(event), event.step) for event in reports if isinstance(event, Stepped | Evaluated)]
    for place, (kind, step) in enumerate(done):
        if kind is Evaluated and step:
            assert done[place - 1] == (Stepped, step)  # everything before an evaluation is reported before it


def test_a_stopped_run_continues_to_the_same_bytes(settings: Any, tmp_path: Path) -> None:
    run_and_resume(settings, tmp_path, 2, lora_dropout=0.1, dtype="float16")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_divergence_that_is_read_late_changes_nothing_and_is_saved_nowhere(
    settings: Any, tmp_path: Path, part: str
) -> None:
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0}
    config = settings(save_steps=2, max_steps=6, **constant)
    good = {"loss": 1, "gradient": 2}[part]  # steps whose weights gave a finite loss in the next one
    short = settings(output_dir=str(tmp_path / "short"), max_steps=good, **constant)
    run(short)
    where = (
        "first module with non-finite output"
        if part == "loss"
        else "the gradients are not finite, although the loss is"
    )
    with ExitStack() as stack:
        trainer = BreakingTrainer(config, stack, part=part, broken=3)
        with pytest.raises(DivergedError, match=rf"in step 3 .*{where}"):
            trainer.train()
    assert trainer.queued == 4  # one step more was queued by then
    assert adapter(config) == adapter(short)
    saved = [path.name for path in checkpoints_in(Path(config.output_dir))]
    assert saved == ([] if part == "loss" else ["checkpoint-2"])
    assert [step for step, _ in losses(config)] == [1, 2]


class BreakingTrainer(Trainer):
    """A run whose loss or gradient is not finite in one step."""

    def __init__(self, config: TrainConfig, stack: ExitStack, part: str, broken: int) -> None:
        super().__init__(config, stack)
        self.part, self.broken, self.queued = part, broken, 0

    def step(self, step: Step, started: float, stop: bool = False) -> None:
        self.queued += 1
        if self.queued == self.broken:  # and from then on
            layer = self.run.base.model.layers[0].mlp.down_proj
            parameters = self.run.updates.buffers[0].parameters
            parameter = next(parameters[name] for name in parameters if "down_proj.lora_B" in name)
            nan = float("nan")
            if self.part == "loss":
                layer.register_forward_hook(lambda _module, _inputs, output: output * nan)
            else:
                parameter.register_hook(lambda gradient: gradient * nan)
        super().step(step, started, stop)
