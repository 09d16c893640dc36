import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from runs import adapter, changed, losses, run_and_collect, run_and_resume, stopping_at
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tailora.core.setting_names import REMOVED_SETTINGS
from tailora.data.dataset import Examples
from tailora.errors import CheckpointError
from tailora.formats.run_folder import checkpoints_in
from tailora.train import checkpoint, events, failures
from tailora.train.config import TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.state import TrainState
from tailora.train.trainer import SECONDS_BETWEEN_CHECKPOINTS, Trainer, run

LONG = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "eval_steps": 2,
    "save_steps": 2,
}  # 9 steps of 3 epochs, checkpoints at 2, 4, 6, 8


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(settings: Any, tmp_path: Path) -> None:
    """A process that is killed leaves what its folder contains at that moment."""
    whole, killed = (settings(output_dir=str(tmp_path / name), **LONG) for name in ("whole", "killed"))

    def copy(event: events.Event) -> None:
        if isinstance(event, events.Stepped) and event.step == 5:
            shutil.copytree(whole.output_dir, killed.output_dir)

    result = run(whole, on_event=copy)
    assert [path.name for path in checkpoints_in(Path(killed.output_dir))] == ["checkpoint-2", "checkpoint-4"]
    resumed = run(changed(killed, resume_from_checkpoint="latest"))
    assert adapter(killed) == adapter(whole)
    assert losses(killed) == losses(whole)
    same = ["steps", "train_tokens", "supervised_tokens", "eval_loss_before", "eval_loss_after", "best_step"]
    assert [getattr(resumed, name) for name in same] == [getattr(result, name) for name in same]
    assert (resumed.before.sums == result.before.sums).all()


SECOND_PASS = {"streaming": True, "max_steps": 9, "save_steps": 8, "per_device_train_batch_size": 4}  # over 30 rows
DROPOUT = {"max_steps": 4, "lora_dropout": 0.1}
FULL_LAYER = {**DROPOUT, "learn_scaling": True, "modules_to_save": ["norm"], "weight_decay": 0.1, "use_dora": True}


@pytest.mark.parametrize(
    ("step", "number", "changes"),
    [
        pytest.param(0, signal.SIGINT, {"max_steps": 2}, id="before the first step"),
        pytest.param(8, signal.SIGINT, SECOND_PASS, id="a stream"),
        pytest.param(2, signal.SIGTERM, FULL_LAYER, id="all that can be trained"),
    ],
)
def test_an_interrupted_run_saves_says_where_and_continues_to_the_same_bytes(
    settings: Any, tmp_path: Path, step: int, number: int, changes: dict[str, Any]
) -> None:
    handlers = [signal.getsignal(signal_number) for signal_number in (signal.SIGINT, signal.SIGTERM)]
    run_and_resume(settings, tmp_path, step, number, **changes)
    assert [signal.getsignal(signal_number) for signal_number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_another_signal_while_an_interrupted_run_saves_and_ends_changes_nothing(settings: Any, tmp_path: Path) -> None:
    """As torchrun does: SIGTERM to every process after Ctrl-C."""

    def stop(event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            os.kill(os.getpid(), signal.SIGINT)
        if isinstance(event, events.Saved):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(failures.Interrupted) as caught:
        run(settings(max_steps=2), on_event=stop)
    assert caught.value.folder == tmp_path / "out" / "checkpoint-1"


def test_a_mixture_continues_where_it_was(settings: Any, data_file: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("north south one two three " * 30)
    mixture = {"data": [f"{data_file}=0.4", f"{texts}=1.5"], "max_length": 64, "max_steps": 9}  # more than two epochs
    stopped = run_and_resume(settings, tmp_path, 5, **mixture)
    other = changed(stopped, resume_from_checkpoint="latest", data=[f"{data_file}=0.4", f"{texts}=2"])
    with pytest.raises(CheckpointError, match=r"data was \[.*=1.5'\] and is now \[.*=2'\]"):
        run(other)


def test_a_resumed_run_keeps_the_products_that_it_was_started_with(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others are faster now."""
    choices = iter([4, None])
    monkeypatch.setattr("tailora.train.kernel_choice.fastest_products", lambda _: next(choices))
    config = settings(max_steps=4, save_steps=2, dtype="bfloat16")
    run(config)
    before = adapter(config)
    resumed = changed(config, resume_from_checkpoint=f"{config.output_dir}/checkpoint-2")
    _, (prepared,) = run_and_collect(resumed, events.Prepared)
    assert "matrix products: float32 for 4 tokens or more (faster here than bfloat16)" in prepared.header["kernels"]
    assert adapter(config) == before


@pytest.fixture(scope="module")
def finished_run(make_settings: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of four steps with checkpoints at 2 and 4, made once."""
    config = make_settings(
        output_dir=str(tmp_path_factory.mktemp("finished") / "out"), max_steps=4, save_steps=2, eval_steps=2
    )
    run(config)
    return config  # type: ignore[no-any-return]


@pytest.fixture
def two_checkpoints(finished_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Settings that resume a copy of that run."""
    shutil.copytree(finished_run.output_dir, tmp_path / "out")
    return changed(finished_run, output_dir=str(tmp_path / "out"), resume_from_checkpoint="latest")


def test_checkpoints_after_the_resumed_one_are_deleted(two_checkpoints: TrainConfig) -> None:
    folder, found = Path(two_checkpoints.output_dir), dict[int, list[str]]()
    changes = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "save_steps": 1, "save_total_limit": 1}

    def look(event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            found[event.step] = [path.name for path in checkpoints_in(folder)]

    assert {path.suffix for path in folder.glob("checkpoint-*/*")} == {".safetensors", ".json"}  # no pickle
    run(changed(two_checkpoints, **changes), look)
    assert found[4] == ["checkpoint-3"]  # the newest


HARMS = [("optimizer.safetensors", "changed"), ("adapter.safetensors", "cut"), ("state.json", "missing")]
HARMS += [pytest.param(name, "changed", marks=pytest.mark.exhaustive) for name in ("best.safetensors", "state.json")]


def harm_file(path: Path, harm: str) -> None:
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize(("name", "harm"), HARMS)
def test_a_damaged_checkpoint_is_refused_by_path_and_latest_takes_the_good_one_and_says_so(
    two_checkpoints: TrainConfig, name: str, harm: str
) -> None:
    newest = Path(two_checkpoints.output_dir) / "checkpoint-4"
    before = adapter(two_checkpoints)
    harm_file(newest / name, harm)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*checkpoint-2") as caught:
        run(changed(two_checkpoints, resume_from_checkpoint=str(newest)))
    assert name in str(caught.value)
    _, notes = run_and_collect(two_checkpoints, events.Note)
    assert notes[0].text.startswith("resuming from checkpoint-2, because checkpoint-4 is damaged")
    assert name in notes[0].text
    assert adapter(two_checkpoints) == before


def test_no_whole_checkpoint_is_an_error(two_checkpoints: TrainConfig) -> None:
    for folder in checkpoints_in(Path(two_checkpoints.output_dir)):
        (folder / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)checkpoint-4 is damaged.*checkpoint-2.*all are damaged, so start over"
    ):
        run(two_checkpoints)


def test_a_resume_on_other_weights_at_the_same_path_is_refused_with_both_values(
    two_checkpoints: TrainConfig, model_folder: Path, tmp_path: Path
) -> None:
    before = adapter(two_checkpoints)
    kept = shutil.copytree(model_folder, tmp_path / "kept")
    try:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        norm = model.model.norm.weight  # not an adapted layer
        with torch.no_grad():
            norm.add_(1e-6)
        model.save_pretrained(model_folder)
        expected = r"weights differ in 1 of \d+ tensors, starting with model\.norm\.weight.*weight is 1\.0000009"
        with pytest.raises(CheckpointError, match=expected):
            run(two_checkpoints)
    finally:
        shutil.copytree(kept, model_folder, dirs_exist_ok=True)
    rewrite_recorded(two_checkpoints, base={})  # an earlier version recorded nothing about the base
    run(two_checkpoints)
    assert adapter(two_checkpoints) == before


def test_a_resume_with_other_settings_or_data_is_refused_by_name(two_checkpoints: TrainConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(Path(two_checkpoints.data).read_text().replace("red", "blue"))
    names = {"data": r"data content \(SHA-256\) was"}
    for name, value in {"seed": 1, "per_device_train_batch_size": 2, "packing": "off", "data": str(other)}.items():
        with pytest.raises(CheckpointError, match=names.get(name, name)):
            run(changed(two_checkpoints, **{name: value}))


def test_a_resume_may_name_the_device_of_the_run(two_checkpoints: TrainConfig) -> None:
    run(changed(two_checkpoints, device="cpu"))
    rewrite_recorded(two_checkpoints, device="cuda")
    with pytest.raises(CheckpointError, match="type of device was 'cuda' and is now 'cpu'"):
        run(two_checkpoints)


def rewrite_recorded(config: TrainConfig, **changes: Any) -> None:
    """Changes what the newest checkpoint says about its run."""
    folder = checkpoints_in(Path(config.output_dir))[-1]
    saved = checkpoint.load(str(folder), folder.parent, print)
    state = {"progress": saved.state["progress"], "adapter": saved.state["adapter"]}
    checkpoint.save(folder, checkpoint.Checkpoint({**state, "run": {**saved.state["run"], **changes}}, saved.tensors))


def test_a_checkpoint_resumes_with_removed_settings_at_their_defaults_only(two_checkpoints: TrainConfig) -> None:
    folder = checkpoints_in(Path(two_checkpoints.output_dir))[-1]
    settings = checkpoint.load(str(folder), folder.parent, print).state["run"]["settings"]
    removed = {name: default for name, (default, _) in REMOVED_SETTINGS.items()}
    kernels = {"layers": "plain", "activation_memory": None}
    rewrite_recorded(two_checkpoints, settings={**removed, **settings}, kernels=kernels)
    before = adapter(two_checkpoints)
    run(two_checkpoints)
    assert adapter(two_checkpoints) == before
    rewrite_recorded(two_checkpoints, settings={**settings, "adalora": {"target_r": 2}})
    with pytest.raises(CheckpointError, match=r"cannot resume .*: its run used adalora = .*, but AdaLoRA is no longer"):
        run(two_checkpoints)


def test_a_checkpoint_of_layers_that_kept_a_part_of_the_activations_is_refused(two_checkpoints: TrainConfig) -> None:
    rewrite_recorded(two_checkpoints, kernels={"layers": "compiled", "activation_memory": 0.4})
    with pytest.raises(CheckpointError, match=r"its run used activation_memory = 0.4, but compiled layers keep all"):
        run(two_checkpoints)


def test_only_a_run_whose_rate_ignores_the_length_may_be_made_longer(two_checkpoints: TrainConfig) -> None:
    def identity(steps: int, warmup: float) -> dict[str, Any]:
        settings = {"lr_scheduler_type": "constant", "warmup_ratio": warmup, "max_steps": steps, "learning_rate": 1e-3}
        return {"settings": settings, "processes": 1}

    checkpoint.check_same_run(identity(4, 0), identity(6, 0))
    with pytest.raises(CheckpointError, match="max_steps was 4 and is now 6"):
        checkpoint.check_same_run(identity(4, 0.1), identity(6, 0.1))
    with pytest.raises(CheckpointError, match="max_steps was 4 and is now 6"):  # cosine
        run(changed(two_checkpoints, max_steps=6))


def test_resuming_without_a_checkpoint_says_what_to_do(settings: Any) -> None:
    with pytest.raises(CheckpointError, match="--save-steps"):
        run(settings(resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match="not a folder"):
        run(settings(resume_from_checkpoint="/nowhere/checkpoint-3"))


def test_moments_are_saved_by_parameter(two_checkpoints: TrainConfig) -> None:
    folder = Path(two_checkpoints.output_dir) / "checkpoint-4"
    parameters, moments = (load_file(folder / f"{name}.safetensors") for name in ("adapter", "optimizer"))
    assert {name: tensor.shape for name, tensor in moments.items()} == {
        f"{name}|{key}": () if key == "step" else parameter.shape
        for name, parameter in parameters.items()
        if not name.endswith(".scaling")  # which is not trained
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_the_last_evaluation_is_logged_once_if_the_run_ends_right_after_it(settings: Any) -> None:
    config = settings(max_steps=2, save_steps=2)

    def fail(event: events.Event) -> None:
        if isinstance(event, events.Evaluated) and event.step == 2:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        run(config, on_event=fail)
    before = losses(config)
    assert [step for step, _ in before] == [0, 1, 2, 2]  # the last is the held-out loss
    run(changed(config, resume_from_checkpoint="latest"))
    assert losses(config) == before


def test_patience_counts_the_evaluations_before_a_resume(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out_loss(trainer: Trainer, **_: Any) -> Evaluation:
        counts = np.ones(len(cast(Examples, trainer.run.data.held_out)), np.int64)
        return Evaluation(counts * (2.0 if trainer.state.step == 2 else 1.0), counts)  # the first of the best is kept

    monkeypatch.setattr(Trainer, "held_out_loss", held_out_loss)
    config = settings(max_steps=9, eval_steps=1, save_steps=1, early_stopping_patience=3)
    with pytest.raises(failures.Interrupted):
        run(config, on_event=stopping_at(2, signal.SIGINT))
    result = run(changed(config, resume_from_checkpoint="latest"))
    assert (result.steps, result.best_step) == (4, 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[events.Event], None]:
    """A listener: with it, every step takes half of the time between two checkpoints."""
    elapsed, monotonic = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + elapsed[0])

    def listener(event: events.Event) -> None:
        elapsed[0] += isinstance(event, events.Stepped) * SECONDS_BETWEEN_CHECKPOINTS / 2

    return listener


@pytest.mark.parametrize(
    ("changes", "saved"),
    [({}, [3, 6]), ({"save_steps": 0}, []), ({"method": "full", "r": 16}, [])],
)
def test_a_checkpoint_is_saved_after_some_time(
    changes: dict[str, Any], saved: list[int], settings: Any, clock: Callable[[events.Event], None]
) -> None:
    config = settings(max_steps=6, **changes)
    run(config, on_event=clock)
    late = int(torch.accelerator.is_available() and "save_steps" not in changes)  # what is read of a step comes later
    names = [f"checkpoint-{step + late}" for step in saved]
    assert [path.name for path in checkpoints_in(Path(config.output_dir))] == names


def test_a_checkpoint_that_another_rank_asks_for_is_saved_here(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [0]

    def reduce(_: Any, numbers: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        steps[0] += 1
        return numbers + torch.tensor([0.0, 0.0, float(steps[0] == 2)])

    monkeypatch.setattr(Accelerator, "reduce", reduce)
    config = settings(max_steps=4)
    run(config)
    assert [path.name for path in checkpoints_in(Path(config.output_dir))] == ["checkpoint-2"]


def test_the_first_rank_alone_looks_at_the_clock(settings: Any) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.config = settings()
    trainer.state = TrainState(last_saved=time.monotonic() - SECONDS_BETWEEN_CHECKPOINTS)
    for is_main in (True, False):
        trainer.run = cast(Any, SimpleNamespace(is_main=is_main))
        assert trainer.is_time_to_save() == is_main


def test_a_run_with_rewards_stops_where_its_completions_have_been_used(settings: Any, tmp_path: Path) -> None:
    """A checkpoint has no completions, so a second iteration on them could not follow."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {number}"}}\n' for number in range(8)))
    rewards = {"task": "grpo", "data": str(tmp_path / "prompts.jsonl"), "reward": ["max_length:5"], "samples": 0}
    rewards |= {"num_generations": 4, "max_completion_length": 4, "num_iterations": 2, "max_steps": 4}
    with pytest.raises(failures.Interrupted) as caught:
        run(settings(validation_split=0, **rewards), on_event=stopping_at(1, signal.SIGINT))
    assert caught.value.folder.name == "checkpoint-2"
