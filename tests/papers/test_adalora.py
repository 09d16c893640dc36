"""AdaLoRA (arXiv:2303.10512): the update, the penalty, the importance, the budget; and what is left."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import chat_model
from torch import Tensor, nn

from tailora import AdaLoRA, LoRAConfig, LoRALayer, LoRAModel
from tailora.core.adalora import RankAllocator, budget
from tailora.errors import AdapterError, ConfigError, TargetError


def two_layers(**changes: Any) -> LoRAModel:
    """Only the first layer's output is wrong, in three directions."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)).double()
    return LoRAModel(base, LoRAConfig(r=6, lora_alpha=6, adalora=AdaLoRA(**{"target_r": 2, **changes})))


def trained(steps: int = 60, **changes: Any) -> tuple[LoRAModel, RankAllocator, Tensor]:
    model = two_layers(**changes)
    x = torch.randn(64, 20, dtype=torch.float64)
    wrong = torch.zeros(20, 20, dtype=torch.float64)
    wrong[:3, :3] = 3 * torch.eye(3)
    base = model.base_model
    target = (x @ (base[0].weight + wrong).T @ base[1].weight.T).detach()
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=3e-2, weight_decay=0)
    allocator = model.allocate_ranks(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model, allocator, x


def ranks(model: LoRAModel) -> dict[str, int]:
    return {path: int(layer.lora_E.count_nonzero()) for path, layer in model.lora_layers.items()}


def test_the_update_is_b_diag_e_a_and_starts_at_zero() -> None:
    """W + P Lambda Q, Lambda = 0 (eq. 3)."""
    model = two_layers()
    x = torch.randn(5, 20, dtype=torch.float64)
    assert torch.equal(model(x), copy.deepcopy(model).unload()(x))
    layer = model.lora_layers["0"]
    layer.lora_E.data.normal_()
    expected = layer.lora_B @ torch.diag(layer.lora_E) @ layer.lora_A  # scale 1
    torch.testing.assert_close(layer.delta_weight(), expected)
    torch.testing.assert_close(model.base_model[0](x), x @ (model.base_model[0].weight + expected).T)
    with model.merged():
        torch.testing.assert_close(model.base_model[0](x), x @ model.base_model[0].weight.T)


def penalty(layer: LoRALayer) -> Tensor:
    A, B = layer.lora_A.flatten(1), layer.lora_B
    eye = torch.eye(len(A), dtype=A.dtype)
    return (B.T @ B - eye).square().sum() + (A @ A.T - eye).square().sum()


def test_the_penalty_s_gradient_is_added_before_the_step() -> None:
    """R(P, Q) = ||P^T P - I||^2 + ||Q Q^T - I||^2 (eq. 4), zero where the factors start."""
    model = two_layers(orth_reg_weight=0.3)
    layer = model.lora_layers["0"]
    assert penalty(layer).item() == pytest.approx(0, abs=1e-20)
    for factor in (layer.lora_A, layer.lora_B):
        factor.data += 0.1 * torch.randn_like(factor)
    optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.0)
    model.allocate_ranks(optimizer, 10)
    model(torch.randn(5, 20, dtype=torch.float64)).square().sum().backward()
    before = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]
    optimizer.step()
    expected = torch.autograd.grad(penalty(layer), [layer.lora_A, layer.lora_B])
    for old, new, own in zip(before, (layer.lora_A.grad, layer.lora_B.grad), expected, strict=True):
        torch.testing.assert_close(new, old + 0.3 * own)


def test_importance_is_smoothed_sensitivity_times_its_uncertainty() -> None:
    """I = |w dL/dw|, averaged by beta1, its uncertainty by beta2; S_i = s(E_i) + the means of s over A's row and B's
    column (sec. 3.2).
    """
    beta1, beta2 = 0.85, 0.6
    model = two_layers(orth_reg_weight=0, beta1=beta1, beta2=beta2)
    layer = model.lora_layers["1"]
    layer.lora_E.data.normal_()  # at zero the factors have no gradient
    optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.05)
    allocator = model.allocate_ranks(optimizer, 100)
    smooth = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    unsure = copy.deepcopy(smooth)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.randn(5, 20, dtype=torch.float64)) - 1).square().mean().backward()
        for name, p in layer.named_parameters():
            now = (p * p.grad).abs().detach()
            smooth[name] = beta1 * smooth[name] + (1 - beta1) * now
            unsure[name] = beta2 * unsure[name] + (1 - beta2) * (now - smooth[name]).abs()
        optimizer.step()
    s = {name: smooth[name] * unsure[name] for name in smooth}
    expected = s["lora_E"] + s["lora_A"].mean(dim=1) + s["lora_B"].mean(dim=0)
    assert (s["lora_A"].mean(dim=1) > 1e-3 * expected).all()  # every part counts
    assert (s["lora_B"].mean(dim=0) > 1e-3 * expected).all()
    torch.testing.assert_close(allocator.importance("1"), expected, rtol=1e-9, atol=0)


def test_the_budget_falls_by_a_cubic() -> None:
    """b0 up to t_i, b_T from T - t_f, else b_T + (b0 - b_T)(1 - (t - t_i) / (T - t_i - t_f))^3 (sec. 3.3)."""
    course = [budget(t, 100, 10, 30, 96, 32) for t in range(101)]
    assert course[:11] == [96] * 11
    assert course[70:] == [32] * 31
    assert course[40] == 32 + 64 // 8
    assert course == sorted(course, reverse=True)


def test_ranks_fall_every_deltat_steps_and_are_final_tfinal_steps_before_the_end() -> None:
    """sec. 3.3: b0 = 12 until t_i = 3, b_T = 4 from step T - t_f = 20 - 6 on."""
    model = two_layers(tinit=3, tfinal=6, deltaT=4)
    optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.01)
    allocator = model.allocate_ranks(optimizer, 20)
    on, final = [], []
    for _ in range(20):
        for layer in model.lora_layers.values():
            layer.lora_E.data.normal_()  # what is switched off may come back
        model(torch.randn(5, 20, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        on.append(sum(ranks(model).values()))
        final.append(allocator.final)
    at = {step: budget(step, 20, 3, 6, 12, 4) for step in (3, 7, 11)}
    assert at[7] < at[3] == 12
    assert on == [at.get(step, 12) for step in range(1, 14)] + [4] * 7
    assert final == [False] * 13 + [True] * 7


def test_ranks_go_where_they_matter_and_stay_within_the_budget() -> None:
    model, allocator, _ = trained()
    assert allocator.final
    assert sum(ranks(model).values()) == 4
    assert ranks(model)["0"] > ranks(model)["1"]
    for layer in model.lora_layers.values():
        assert penalty(layer) < 0.05


def test_the_result_is_plain_lora_in_the_model_and_in_the_file(tmp_path: Path) -> None:
    model, _, x = trained()
    left, expected = ranks(model), model(x)
    model.save_adapter(tmp_path)
    loaded = LoRAModel.from_pretrained(two_layers().unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    assert {path: layer.r for path, layer in loaded.lora_layers.items()} == {p: max(1, r) for p, r in left.items()}
    assert all(layer.scaling.item() == 1 for layer in loaded.lora_layers.values())
    assert loaded.adapters["default"].adalora is None
    model.settle_ranks()
    torch.testing.assert_close(model(x), expected)
    assert model.adapters == loaded.adapters
    assert {type(layer) for layer in model.lora_layers.values()} == {LoRALayer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(two_layers().unload(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), expected, rtol=2e-5, atol=2e-5)


def test_an_allocator_resumes_to_the_same_bits() -> None:
    _, allocator, _ = trained()
    saved = allocator.state_dict()
    other = two_layers()
    again = other.allocate_ranks(torch.optim.SGD(other.lora_layers.parameters(), lr=0.1), 60)
    assert not again.final
    again.load_state_dict(saved)
    assert again.final
    assert again.step == 60
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in saved.items())


def test_invalid_rank_allocations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_r = 8 is above r = 4"):
        LoRAConfig(r=4, adalora=AdaLoRA(target_r=8))
    with pytest.raises(ConfigError, match="adalora has its own initialization"):
        LoRAConfig(adalora=AdaLoRA(target_r=2), init_lora_weights="pissa")
    with pytest.raises(TargetError, match="adalora prunes each layer's ranks separately"):
        LoRAModel(
            nn.Sequential(nn.Conv1d(8, 8, 3, groups=2)),
            LoRAConfig(r=4, target_modules=["0"], adalora=AdaLoRA(target_r=2)),
        )
    model = two_layers(tinit=5, tfinal=6)
    optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.1)
    with pytest.raises(AdapterError, match="never allocated"):
        model.save_adapter(tmp_path)
    with pytest.raises(ConfigError, match="must be less than 11 steps"):
        model.allocate_ranks(optimizer, 11)
    plain = LoRAModel(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="fixed ranks"):
        plain.allocate_ranks(optimizer, 10)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"learn_scaling": True}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str
)
def test_every_slot_computes_the_same_when_ranks_are_dropped(settings: dict[str, Any], tmp_path: Path) -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=6, adalora=AdaLoRA(target_r=2), **settings))
    model.allocate_ranks(torch.optim.SGD(model.lora_layers.parameters(), lr=0.1), 10)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    for layer in model.lora_layers.values():
        layer.lora_E.data = torch.randn(6, generator=generator) * (torch.rand(6, generator=generator) > 0.5)
        if layer.learns_scaling:
            layer.scaling.data += 0.5
    ids = torch.arange(3, 30)[None]
    model.eval().save_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(chat_model(), str(tmp_path)).eval()
    for other in (LoRAModel.from_pretrained(chat_model(), tmp_path).eval(), theirs):
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)
