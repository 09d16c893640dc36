"""DoRA (arXiv:2402.09353): one test per equation cited."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core import dora


def stirred(r: int = 4, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[LoRAModel, Any, Any]:
    """A DoRA model, its base layer and its adapter, both factors and the magnitude away from the start."""
    torch.manual_seed(0)
    model = LoRAModel(nn.Sequential(nn.Linear(24, 16, dtype=dtype)), LoRAConfig(r=r, use_dora=True, **settings))
    (adapter,) = model.lora_layers.values()
    adapter.lora_B.data.normal_(std=0.05)
    adapter.lora_magnitude_vector.data.mul_(torch.rand(16, dtype=dtype) + 0.5)
    return model, model.base_model[0], adapter


def test_the_weight_is_the_magnitude_times_the_direction() -> None:
    """Eq. 5: W' = m (W0 + B A) / ||W0 + B A||, and m starts as ||W0||."""
    fresh = LoRAModel(nn.Sequential(nn.Linear(24, 16, dtype=torch.float64)), LoRAConfig(r=4, use_dora=True))
    (start,) = fresh.lora_layers.values()
    torch.testing.assert_close(start.lora_magnitude_vector, fresh.base_model[0].weight.norm(dim=1))

    model, base, adapter = stirred()
    x = torch.randn(5, 24, dtype=torch.float64)
    V = base.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    expected = x @ (adapter.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)).T + base.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_treats_the_norm_as_a_constant() -> None:
    """Sec. 4.3, against autograd with the norm detached; eq. 6 without that gives another gradient of the direction."""
    model, base, adapter = stirred()
    x, target = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    parameters = [adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y - target).square().sum(), parameters)

    def by_equation(detached: bool) -> Tensor:
        V = base.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
        norm = V.norm(dim=1, keepdim=True)
        return x @ (adapter.lora_magnitude_vector[:, None] * V / (norm.detach() if detached else norm)).T + base.bias

    ours = gradients(model(x))
    torch.testing.assert_close(ours, gradients(by_equation(True)), rtol=1e-11, atol=1e-11)
    full = gradients(by_equation(False))
    assert not torch.allclose(ours[1], full[1], rtol=1e-2)
    torch.testing.assert_close(ours[2], full[2])  # the magnitude's is the same


def test_the_norm_comes_from_the_low_rank_terms() -> None:
    """||W||^2 + 2 <W A^T, s B> + <s B (A A^T), s B> by rows is ||W + s B A||^2: to 1e-6 on a 16-bit weight."""
    torch.manual_seed(0)
    layer = nn.Linear(3000, 500, dtype=torch.bfloat16)
    model = LoRAModel(nn.Sequential(layer), LoRAConfig(r=8, use_dora=True))
    (adapter,) = model.lora_layers.values()
    adapter.lora_B.data.normal_(std=0.02)
    gain = adapter.gain(layer)
    V = layer.weight.double() + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    norm = adapter.lora_magnitude_vector / gain
    torch.testing.assert_close(norm.double(), V.norm(dim=1), rtol=1e-6, atol=0)


def test_a_row_of_zeros_has_no_direction_and_breaks_nothing() -> None:
    model, base, adapter = stirred(dtype=torch.float32)
    with torch.no_grad():
        base.weight[3] = 0
        adapter.lora_B[3] = 0
        adapter.lora_magnitude_vector[3] = 0
    x = torch.randn(5, 24)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y[:, 3], base.bias[3].expand(5))
    assert all(parameter.grad.isfinite().all() for parameter in model.lora_layers.parameters())
    assert adapter.lora_B.grad[3].any()  # so that it does not stay zero
    assert adapter.row_norms.has_zeros


def test_the_strength_dial_and_a_second_adapter_scale_and_add_what_the_weight_changes_by() -> None:
    """W + t (W' - W): off at 0, as trained at 1; several adapters add their changes, merged or not."""
    model, base, _ = stirred()
    x, plain = torch.randn(5, 24, dtype=torch.float64), base.weight @ torch.eye(24, dtype=torch.float64)
    model.add_adapter("other", LoRAConfig(r=2, use_dora=True))
    other = model.adapter("other").low_rank["0"]
    other.lora_B.data.normal_(std=0.1)
    full = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        full[name] = model(x)
        for strength in (0.0, 0.3):
            model.set_scale(name, strength)
            off = x @ plain.T + base.bias
            torch.testing.assert_close(model(x), off + strength * (full[name] - off))
        model.set_scale(name, 1)
    model.set_adapter(["default", "other"])
    together = full["default"] + full["other"] - off
    torch.testing.assert_close(model(x), together)
    with model.merged():
        torch.testing.assert_close(model(x), together)


def trained_by(**settings: bool) -> Callable[[LoRAModel], None]:
    def step(model: LoRAModel) -> None:
        optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.1, **settings)
        for parameter in model.lora_layers.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def doubled(module: nn.Module) -> None:
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()})


def other_memory(model: LoRAModel) -> None:
    """Twice, which may be the same memory again; torch counts no change of the weight."""
    for _ in range(2):
        model.base_model[0].weight.data = model.base_model[0].weight.data * 2


def other_tensor(model: LoRAModel) -> Tensor:
    """Returns the old one, which stays alive."""
    weight: Tensor = model.base_model[0].weight
    model.base_model[0].weight = nn.Parameter(weight.detach() * 2, requires_grad=False)
    return weight


CHANGES: dict[str, Callable[[LoRAModel], Any]] = {
    "through .data": lambda model: model.lora_layers["0"].lora_A.data.mul_(2),
    "of .data": lambda model: setattr(model.lora_layers["0"].lora_A, "data", model.lora_layers["0"].lora_A.data * 2),
    "of a buffer through .data": lambda model: model.lora_layers["0"].scaling.data.mul_(2),
    "load_state_dict": lambda model: doubled(model.lora_layers),
    "optimizer": trained_by(foreach=False),
    "foreach optimizer": trained_by(foreach=True),
    "fused optimizer": trained_by(fused=True),
    "scaling": lambda model: setattr(model.lora_layers["0"], "scaling", 5.0),
    "strength": lambda model: model.set_scale("default", 0.5),
    "base": lambda model: doubled(model.base_model),
    "memory of the base": other_memory,
    "tensor of the base": other_tensor,
    "precision": lambda model: model.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_the_norms_follow_every_change(change: str, context: Callable[[], Any]) -> None:
    model, base, adapter = stirred(dtype=torch.float32)
    x = torch.randn(5, 24)
    with context():
        before = model(x)
    _kept = CHANGES[change](model)
    with context():
        after = model(x)
    assert not torch.equal(after, before)
    V = base.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    full = x @ (adapter.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)).T + base.bias
    plain = x @ base.weight.T + base.bias
    torch.testing.assert_close(after, plain + adapter.strength * (full - plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "bound"), [(0.1, 6e-5), (1.0, 3e-4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_in_the_weight_s_own_precision_is_near_enough(
    dtype: torch.dtype, size: float, bound: float, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on devices, where W as a whole would be widened. `size`: of the update, in units of W."""
    monkeypatch.setattr(dora, "_has_blocks", lambda _: False)
    torch.manual_seed(0)
    W, A = (torch.randn(1, 576, 576) / 24).to(dtype), (torch.rand(1, 16, 576) * 2 - 1) / 24
    B = W.float() @ A.mT  # along W, so that the product counts most
    B *= size / (B @ A).norm(dim=2).mean()
    truth = (W.double() + B.double() @ A.double()).norm(dim=2).flatten()
    stored, left, right = (W.mT, A.mT, B.mT) if transposed else (W, B, A)
    norms = dora.row_norms(stored, transposed, dora.row_squares(stored, transposed, torch.float32), left, right)
    torch.testing.assert_close(norms.double(), truth, rtol=bound, atol=0)


def test_training_goes_on_after_inference_mode() -> None:
    model, _, adapter = stirred(dtype=torch.float32)
    x = torch.randn(5, 24)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert adapter.lora_magnitude_vector.grad.isfinite().all()
