"""Runs that start from weights or data: said aloud, and continued to the same bytes."""

from pathlib import Path
from typing import Any

import pytest
from runs import assert_resumed_alike

from tailora import LoRAModel
from tailora.train import events
from tailora.train.trainer import run

SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "init_batches": 2, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    "name", ["eva", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("pissa", "olora"))]
)
@pytest.mark.slow
def test_a_run_starts_so_says_so_and_goes_on_to_the_same_bytes(settings: Any, tmp_path: Path, name: str) -> None:
    whole, stopped = (
        settings(output_dir=str(tmp_path / folder), init_lora_weights=name, loraplus_lr_ratio=4, **SHORT)
        for folder in ("whole", "stopped")
    )
    reports: list[events.Event] = []
    result = run(whole, on_event=reports.append)
    header = next(event.header for event in reports if isinstance(event, events.Prepared))
    assert header["start"].startswith(name)
    assert result.eval_loss_after < result.eval_loss_before

    assert_resumed_alike(whole, stopped, 2)


def test_a_start_from_data_sees_no_padding(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows in 16 bits are padded, and the principal components must be those of the data alone."""
    sizes: list[tuple[int, int]] = []  # tokens of each forward, and those of its examples

    def start_from_data(model: Any, batches: Any, loss: Any) -> None:
        embedding = model.base_model.get_input_embeddings()
        for batch in batches:
            seen: list[int] = []
            with embedding.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].numel())):
                loss(model, batch)
            sizes.append((sum(seen), sum(len(example.input_ids) for example in batch)))
        start(model, batches, loss)

    start = LoRAModel.start_from_data
    monkeypatch.setattr(LoRAModel, "start_from_data", start_from_data)
    run(settings(dtype="bfloat16", init_lora_weights="eva", max_steps=1))
    assert sizes
    assert all(forward == data for forward, data in sizes)
    assert any(data % 16 for _, data in sizes)


def test_a_stream_is_read_as_far_as_the_start_needs(settings: Any) -> None:
    config = settings(init_lora_weights="eva", streaming=True, max_steps=2, init_batches=3, validation_split=0)
    result = run(config)
    assert len({layer.r for layer in result.model.lora_layers.values()}) > 1
