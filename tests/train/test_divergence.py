"""What is kept when the numbers break, and who may write where."""

import json
import os
import shlex
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import adapter, run_and_collect, stopping_at
from safetensors.torch import load_file
from torch import nn

from tailora.errors import CheckpointError, ConfigError, DataError, DivergedError
from tailora.formats.run_folder import checkpoints_in
from tailora.kernels.loss import FORMS
from tailora.train import trainer
from tailora.train.config import TrainConfig
from tailora.train.divergence import broken_loss
from tailora.train.events import Event, Note, Stepped
from tailora.train.failures import Interrupted
from tailora.train.loss import CAUSAL_LM, BatchLayout
from tailora.train.run_log import check_run_folder, has_diverged, lock
from tailora.train.trainer import Trainer, run


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"learning_rate": 1e38, "max_steps": 1, "validation_split": 0}, "the weights became NaN or infinite"),
        ({"learning_rate": 1e25, "eval_steps": 1, "max_steps": 2}, "held-out loss became nan"),
        ({"learning_rate": 1e20, "max_steps": 10, "max_grad_norm": 1}, r"step \d+ \(learning rate 1e\+20\).*layers\.0"),
    ],
)
def test_the_last_good_adapter_is_kept(settings: Any, changes: dict[str, Any], cause: str) -> None:
    config = settings(**{"warmup_ratio": 0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9, **changes})
    with pytest.raises(DivergedError, match=cause) as caught:
        run(config)
    assert caught.value.exit_code == 3
    assert not json.loads((Path(config.output_dir) / "run.json").read_text())["finished"]
    tensors = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_last_good_checkpoint_is_kept_named_and_resumed_with_a_lower_rate(settings: Any) -> None:
    changes = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "warmup_ratio": 0}
    config = settings(lr_scheduler_type="constant", validation_split=0, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "learning_rate", lambda step, *_: 1e-2 if step == 0 else 1e38)
        with pytest.raises(DivergedError, match=r"the last good checkpoint is .*checkpoint-1;") as caught:
            run(config)
    assert [path.name for path in checkpoints_in(Path(config.output_dir))] == ["checkpoint-1"]
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert words[:2] == ["tailora", "train"]
    assert words[-4:] == ["--resume-from-checkpoint", f"{config.output_dir}/checkpoint-1", "--learning-rate", "0.001"]
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01 and is now 0\.1"):
        run(config.replaced(resume_from_checkpoint="latest", learning_rate=0.1))
    result, notes = run_and_collect(config.replaced(resume_from_checkpoint="latest", learning_rate=1e-3), Note)
    assert result.steps == 3
    assert Note("from here on, the learning rate is 0.001 instead of 0.01") in notes
    assert not has_diverged(Path(config.output_dir))


def test_the_first_broken_batch_is_enough_to_name_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = nn.Sequential(nn.Linear(1, 1)), list[Any]()
    model[0].weight.data.fill_(float("nan"))

    def losses(model: nn.Module, batch: Any) -> torch.Tensor:
        computed.append(batch)
        return model(torch.ones(1))

    monkeypatch.setitem(FORMS, "of a test", losses)
    batches: list[Any] = ["first", "second"]
    layout = BatchLayout(True, "of a test", 0)
    cause = broken_loss(model, batches, CAUSAL_LM, layout)
    assert cause == "the loss is not finite; the first module with non-finite output is 0"
    assert computed == ["first"]


def test_no_checkpoint_holds_values_that_are_not_finite(settings: Any) -> None:
    config = settings(max_steps=3, save_steps=1, warmup_ratio=0, validation_split=0)

    def break_moments(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            (moment, *_) = (state["exp_avg_sq"] for state in trainer.run.updates.optimizer.state.values())
            moment[0] = float("inf")

    expected = r"in step 2: .* \(optimizer: 1 tensors, starting with (?s:.*)checkpoint-1"
    with ExitStack() as stack:
        trainer = Trainer(config, stack, break_moments)
        with pytest.raises(DivergedError, match=expected):
            trainer.train()
    assert [path.name for path in checkpoints_in(Path(config.output_dir))] == ["checkpoint-1"]


def test_a_folder_that_another_run_writes_to_is_refused_before_anything_is_loaded(settings: Any) -> None:
    config = settings(max_steps=1)
    busy = rf"another run is writing to .* \(process {os.getpid()} on"
    with lock(Path(config.output_dir)), pytest.raises(ConfigError, match=busy):
        run(config.replaced(model="no such model", data="no such data"))
    run(config)
    assert (Path(config.output_dir) / "adapter").is_dir()


def test_the_leftovers_of_killed_runs_are_removed_and_a_folder_between_two_names_is_put_back(settings: Any) -> None:
    config = settings(max_steps=1)
    folder = Path(config.output_dir)
    with lock(folder):
        for name in ("checkpoint-4.abcdefgh.new", "adapter.abcdefgh.new", "model.abcdefgh.old", "notes.abcdefgh.new"):
            (folder / f".{name}").mkdir()
            (folder / f".{name}" / "part").write_text("")
        for name in (".run.json.abcdefgh", ".notes.abcdefgh"):
            (folder / name).write_text("")
        with pytest.raises(ConfigError):
            run(config)
    assert len(list(folder.iterdir())) == 7  # with .lock: nothing of a run that is alive is touched
    with pytest.raises(ConfigError, match="contains a model of an earlier run"):
        run(config)
    assert {path.name for path in folder.iterdir()} == {".lock", ".notes.abcdefgh", ".notes.abcdefgh.new", "model"}


def test_a_block_that_writes_nothing_leaves_no_lock_and_no_new_folder(tmp_path: Path) -> None:
    mine, new = tmp_path / "mine", tmp_path / "outputs" / "new"
    mine.mkdir()
    for folder in (mine, new):
        with pytest.raises(DataError), lock(folder):
            raise DataError("bad data")
    assert [*tmp_path.iterdir()] == [mine]
    assert not list(mine.iterdir())


def test_overwrite_keeps_the_earlier_run_until_the_new_one_is_whole(settings: Any) -> None:
    config = settings(max_steps=2, save_steps=1)
    folder = Path(config.output_dir)
    run(config)
    (folder / "mine.txt").write_text("")
    before = adapter(config)
    with pytest.raises(ConfigError, match="replace it with --overwrite"):
        run(config)
    with pytest.raises(DataError):
        run(config.replaced(data="no such data"), overwrite=True)
    assert adapter(config) == before
    with pytest.raises(ConfigError, match="--overwrite would replace --adapter"):
        check_run_folder(TrainConfig(adapter=str(folder / "adapter"), output_dir=str(folder)), overwrite=True)
    (folder / "earlier-run").mkdir()  # of a run that failed before it wrote run.json
    other = config.replaced(seed=1)
    for _ in range(2):  # the second finds the earlier run set aside, and what the first has left
        with pytest.raises(Interrupted):
            run(other, stopping_at(1, signal.SIGINT), overwrite=True)
        assert (folder / "earlier-run" / "adapter" / "adapter_model.safetensors").read_bytes() == before
        assert not (folder / "adapter").exists()
    run(other, overwrite=True)
    assert adapter(config) != before
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "adapter", "checkpoint-1", "checkpoint-2", "config.yaml", "examples.jsonl"),
        *("held_out.jsonl", "metrics.jsonl", "mine.txt", "run.json", "trained-rows.bin"),
    }
    with pytest.raises(ConfigError, match="use only one of these flags"):
        run(other.replaced(resume_from_checkpoint="latest"), overwrite=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"but no run\.json"):
        run(other, overwrite=True)
