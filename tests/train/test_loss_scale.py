"""float16: the loss is scaled, so that small gradients are not zero; a step that overflows changes nothing."""

import copy
import json
import statistics
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_and_resume
from tiny import chat_model
from torch import Tensor, nn

from tailora.core.config import LoRAConfig
from tailora.data.dataset import Example
from tailora.errors import DivergedError
from tailora.kernels.attention import packed_rows
from tailora.kernels.flat_parameters import Group, flattened
from tailora.kernels.loss import FROZEN, RECOMPUTED
from tailora.model import LoRAModel
from tailora.report.files import write_page
from tailora.report.pages.train import write_train_report
from tailora.train import optimizer
from tailora.train.divergence import FiniteUpdates
from tailora.train.events import Event, Note, Stepped
from tailora.train.loss import BatchLayout, ModelWithLoss, make_batch
from tailora.train.optimizer import LossScale, adamw, clip_gradients
from tailora.train.trainer import accumulate_gradients, run

CPU = torch.device("cpu")


def test_the_rule_is_that_of_torchs_grad_scaler() -> None:
    ours = LossScale(CPU)
    theirs, growth = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    overflows = torch.rand(9000, generator=torch.Generator().manual_seed(0)) < 4e-4
    seen = set()
    for overflow in overflows:
        torch._amp_update_scale_(theirs, growth, overflow.float(), 2.0, 0.5, 2000)
        ours.update(overflow)
        seen.add(float(ours.value))
        assert (float(ours.value), int(ours.good_steps)) == (float(theirs), int(growth))
    assert len(seen) > 2


def gradient(model: LoRAModel, layout: BatchLayout, supervised: int, scale: Tensor | None, seed: int) -> Tensor:
    """Returns the gradient of a step with this number of supervised tokens, of which one batch is computed here."""
    model.zero_grad()
    ids = torch.randint(300, (200,), generator=torch.Generator().manual_seed(seed)).numpy()
    batch = make_batch([Example.of_text(part) for part in (ids[:60], ids[60:])], layout, CPU)
    accumulate_gradients(ModelWithLoss(model, layout), [batch], supervised, scale)
    flat = torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])
    return flat if scale is None else flat / scale


@pytest.mark.parametrize("form", [FROZEN, RECOMPUTED])
def test_gradients_of_64k_tokens_are_as_near_to_those_of_float32_as_those_of_500(form: str) -> None:
    half = LoRAModel(chat_model().half(), LoRAConfig(r=4))
    for layer in half.lora_layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    whole = LoRAModel(chat_model().half().float(), LoRAConfig(r=4))  # the same rounded weights
    whole.lora_layers.load_state_dict(half.lora_layers.state_dict())
    layout, errors = BatchLayout(True, form, 0), defaultdict[tuple[str, int], list[float]](list)
    with packed_rows(half.base_model), packed_rows(whole.base_model):
        for supervised, seed in product((500, 65536), range(3)):
            exact = gradient(whole, layout, supervised, None, seed)
            for name, scale in (("scaled", LossScale(CPU).value), ("plain", None)):
                difference = gradient(half, layout, supervised, scale, seed) - exact
                errors[name, supervised].append(float(difference.norm() / exact.norm()))
    median = {key: statistics.median(values) for key, values in errors.items()}
    assert median["scaled", 65536] < 1.2 * median["scaled", 500] < 0.02
    assert median["plain", 65536] > 0.1


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(5, 3)), "b": nn.Parameter(torch.randn(7))}


def test_a_step_that_overflows_changes_neither_parameters_nor_moments() -> None:
    one = torch.ones(())
    with flattened([Group(parameters())]) as buffers:
        adam = adamw(buffers)
        updates = FiniteUpdates(adam, buffers, LossScale(CPU))
        states = []
        for number, broken in enumerate((False, True, False)):
            adam.zero_grad(set_to_none=False)
            buffers[0].gradient.fill_(float("inf") if broken else updates.loss_scale.value * (1 + number))
            norm = clip_gradients(buffers, 1e9, updates.loss_scale)
            updates.step(one, norm, 0.1)
            assert bool(updates.skipped) == broken
            state = adam.state[buffers[0].parameter]
            states.append(copy.deepcopy([buffers[0].parameter.detach(), *state.values()]))
        assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
        assert (float(updates.loss_scale.value), bool(updates.diverged)) == (2.0**15, False)


def test_an_overflow_at_the_least_scale_is_a_divergence_and_nothing_changes_after_it() -> None:
    one = torch.ones(())
    with flattened([Group(parameters())]) as buffers:
        updates = FiniteUpdates(adamw(buffers), buffers, LossScale(CPU))
        before = buffers[0].parameter.detach().clone()
        for _ in range(17):
            assert not updates.diverged
            updates.step(one, torch.tensor(float("inf")), 0.1)
        assert updates.diverged
        buffers[0].gradient.fill_(1.0)
        updates.step(one, one, 0.1)
        assert torch.equal(buffers[0].parameter, before)
        updates.restore_last_good()
        assert torch.equal(buffers[0].parameter, before)


@pytest.fixture
def high_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps overflow, and the scale grows again after three good ones."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**24)
    monkeypatch.setattr(LossScale, "INTERVAL", 3)


@pytest.mark.usefixtures("high_scale")
def test_a_run_reports_steps_that_change_nothing_and_learns_from_the_others(settings: Any) -> None:
    seen: list[Event] = []
    config = settings(dtype="float16", max_steps=16)
    result = run(config, seen.append)
    steps = [event for event in seen if isinstance(event, Stepped)]
    skipped = [step.step for step in steps if step.skipped]
    assert skipped[:2] == [1, 2]
    assert len(skipped) < 14
    notes = [event.text for event in seen if isinstance(event, Note) and "was skipped" in event.text]
    assert notes[0] == "step 1 was skipped: a gradient overflowed float16 at loss scale 1.67772e+07"
    assert len(notes) == len(skipped)
    assert result.eval_loss_after < result.eval_loss_before
    folder = Path(config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scales = [line["loss_scale"] for line in lines if "loss" in line]
    assert scales[:2] == [2.0**24, 2.0**23]
    assert [line["step"] for line in lines if line.get("grad_norm", 0) is None] == skipped
    assert write_train_report(folder)["steps"][0]["grad_norm"] is None
    assert write_page(folder).exists()


@pytest.mark.usefixtures("high_scale")
def test_a_resumed_run_goes_on_with_the_same_scale(settings: Any, tmp_path: Path) -> None:
    run_and_resume(settings, tmp_path, 10, dtype="float16", max_steps=12)


def test_a_run_whose_gradients_overflow_at_every_scale_diverges(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "FIRST", 4.0)
    monkeypatch.setattr(optimizer, "gradient_norm_over_ranks", lambda _: torch.tensor(float("inf")))
    with pytest.raises(DivergedError, match=r"in step 3 .*gradients are not finite"):
        run(settings(dtype="float16", max_steps=5))
