"""Settings without a number get one that suits the data, before the first step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import changed

from tailora.errors import CheckpointError
from tailora.train import defaults, events
from tailora.train.config import TrainConfig
from tailora.train.defaults import RunConfig, describe, with_numbers
from tailora.train.model_loading import read_config
from tailora.train.trainer import run


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The width of every model."""
    width = {"of": 576}
    monkeypatch.setattr(defaults, "width_of", lambda _: width["of"])
    return width


def numbers(examples: int, task: str = "causal-lm", processes: int = 1, **settings: Any) -> tuple[float, float, int]:
    data: Any = SimpleNamespace(train=range(examples), report=SimpleNamespace(task=task))
    config = with_numbers(TrainConfig(**settings), data, processes)
    return config.learning_rate, config.num_train_epochs, config.per_device_train_batch_size


def test_small_data_gets_more_steps() -> None:
    assert numbers(24) == (1e-3, 3, 2)
    assert numbers(10**5) == (3e-4, 1, 8)
    steps = [
        examples * passes / batch for examples in (24, 60, 100, 250, 900) for _, passes, batch in [numbers(examples)]
    ]
    assert min(steps) >= 24


def test_wide_models_keep_the_lower_rate(width: dict[str, int]) -> None:
    width["of"] = 4096
    assert numbers(24) == (3e-4, 3, 2)
    assert numbers(24, learning_rate=1e-3) == (1e-3, 3, 2)


def test_a_step_has_as_many_examples_on_several_processes() -> None:
    assert numbers(300, processes=2, gradient_accumulation_steps=2)[2] == 1
    assert numbers(24, processes=8)[2] == 1
    assert numbers(10**5, processes=8)[2] == 8  # large data: per batch, as before


def test_other_tasks_get_passes_for_24_steps() -> None:
    assert numbers(32, task="sequence-classification") == (3e-4, 6, 8)
    assert numbers(10**4, task="preference") == (3e-4, 1, 8)


@pytest.mark.parametrize(
    "given", [{"learning_rate": 2e-4}, {"num_train_epochs": 7}, {"per_device_train_batch_size": 5}]
)
def test_a_flag_overrides_its_part(given: dict[str, Any]) -> None:
    data: Any = SimpleNamespace(train=range(24), report=SimpleNamespace(task="causal-lm"))
    config = TrainConfig(**given)
    chosen = with_numbers(config, data)
    assert chosen.model_dump(include=given.keys()) == given
    text = describe(config, chosen, 24, 36)
    assert text is not None
    assert ("passes" in text, "batches" in text, "rate" in text) == tuple(
        name not in given for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate")
    )


def test_a_run_names_its_numbers_and_is_resumed_with_them(settings: Any) -> None:
    """Also if the run began when other numbers were the default."""
    free = dict.fromkeys(("learning_rate", "num_train_epochs", "per_device_train_batch_size"), "auto")
    config = changed(settings(save_steps=2), **free)
    notes: list[str] = []
    run(config, on_event=lambda event: notes.append(event.text) if isinstance(event, events.Note) else None)
    (note,) = [note for note in notes if "because small data needs steps" in note]
    record = json.loads((Path(config.output_dir) / "run.json").read_text())
    saved = {name: record["settings"][name] for name in free}
    assert f"batches of {saved['per_device_train_batch_size']}, {saved['num_train_epochs']:g} passes" in note
    older = changed(config, **{**saved, "num_train_epochs": 1.0, "per_device_train_batch_size": 3}, max_steps=2)
    older = changed(older, output_dir=f"{config.output_dir}-older", save_steps=1)
    run(older)
    resumed = changed(older, **free, resume_from_checkpoint="latest")
    assert run(resumed).steps == 2
    with pytest.raises(CheckpointError, match="per_device_train_batch_size was 3 and is now 4"):
        run(changed(resumed, per_device_train_batch_size=4))


def test_the_width_is_that_of_the_language_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert defaults.width_of(str(model_folder)) == read_config(str(model_folder)).hidden_size


def test_settings_of_a_run_have_numbers() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        RunConfig(learning_rate="auto", num_train_epochs=1, per_device_train_batch_size=1)
