"""Initial values that are not zero, against the equations of their papers."""

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRALayer, LoRAModel


def start(base: nn.Module, name: str, r: int = 4) -> LoRALayer:
    config = LoRAConfig(r=r, lora_alpha=10, target_modules=["0"], init_lora_weights=name)
    layer = LoRAModel(nn.Sequential(base), config).lora_layers["0"]
    assert isinstance(layer, LoRALayer)
    return layer


def linear(in_features: int = 24, out_features: int = 20, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, dtype=torch.float64)


@pytest.mark.parametrize(("in_features", "out_features", "r"), [(24, 20, 4), (20, 24, 1), (300, 400, 16)])
def test_pissa_starts_at_the_principal_triplets_of_w(in_features: int, out_features: int, r: int) -> None:
    """s B A = U_r S_r V_r^T, split evenly (PiSSA, arXiv:2404.02948, eq. 2 and 3)."""
    base = linear(in_features, out_features)
    U, S, V = torch.linalg.svd(base.weight.detach())
    layer = start(base, "pissa", r)
    kept = layer.scaling * layer.start_B @ layer.start_A
    tail = (base.weight - kept).square().sum()
    assert tail.item() == pytest.approx(S[r:].square().sum().item(), rel=1e-9 if max(base.weight.shape) < 256 else 1e-3)
    if max(base.weight.shape) < 256:
        torch.testing.assert_close(kept, U[:, :r] * S[:r] @ V[:r])
    norms = layer.scaling.sqrt() * layer.lora_B.norm(dim=0), layer.scaling.sqrt() * layer.lora_A.norm(dim=1)
    torch.testing.assert_close(norms[0], norms[1])  # sqrt(S) on either side


def test_olora_starts_at_the_first_columns_of_q_and_rows_of_r() -> None:
    """W = Q R, B = Q_r, A = R_r (OLoRA, arXiv:2406.01775, sec. 3)."""
    base = linear()
    Q, R = torch.linalg.qr(base.weight.detach())
    layer = start(base, "olora")
    torch.testing.assert_close(layer.lora_B.detach(), Q[:, :4])
    torch.testing.assert_close(layer.lora_A.detach(), R[:4])


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_first_step_is_that_of_training_on_the_residual_weight(name: str) -> None:
    """Taking B0 A0 off at run time trains as the paper's residual W - s B0 A0 does (arXiv:2404.02948, eq. 4)."""
    base, x = linear(), torch.randn(7, 24, dtype=torch.float64)
    model = LoRAModel(nn.Sequential(base), LoRAConfig(r=4, target_modules=["0"], init_lora_weights=name))
    layer = model.lora_layers["0"]
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    residual = base.weight - layer.scaling * (B @ A).detach()
    ours = torch.autograd.grad(loss(model(x)), [layer.lora_A, layer.lora_B])
    theirs = torch.autograd.grad(loss(x @ (residual + layer.scaling * B @ A).T + base.bias), [A, B])
    torch.testing.assert_close(ours, theirs)


def loss(y: Tensor) -> Tensor:
    return (y - 1).square().sum()


def test_eva_starts_at_the_principal_components_and_gives_ranks_to_variance() -> None:
    """A = the leading principal directions, ranks to the largest shares of variance (arXiv:2410.07170, sec. 3)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 26)).double()
    base[0].weight.data[:, 2:] = 0  # the second layer's inputs vary in few directions, the first's in all
    inputs = [torch.randn(50, 24, dtype=torch.float64) + 3 for _ in range(3)]
    model = LoRAModel(base, LoRAConfig(r=4, lora_alpha=8, init_lora_weights="eva"))
    before = base.eval()(inputs[0])
    model.start_from_data(inputs)
    read = [torch.cat(inputs), base[:2](torch.cat(inputs)).detach()]
    shares, ranks = [], {}
    for path, x in zip(("0", "2"), read, strict=True):
        layer = model.lora_layers[path]
        _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        ranks[path] = layer.r
        aligned = (layer.lora_A.detach() * V[: layer.r]).sum(1).abs()
        torch.testing.assert_close(aligned, torch.ones_like(aligned))
        assert not layer.lora_B.any()
        assert layer.scaling.item() == 2.0
        shares += [(float(value), path) for value in (S.square() / S.square().sum())[:8]]
    best = [path for _, path in sorted(shares, reverse=True)[:8]]
    assert ranks == {path: best.count(path) for path in ranks}
    assert ranks["0"] != ranks["2"]
    assert model.adapters["default"].rank_pattern == {f"^{path}": r for path, r in ranks.items()}
    assert torch.equal(model(inputs[0]), before)
