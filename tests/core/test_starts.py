"""Starts over every kind: where they hold they compute the base, and where they do not they say why."""

import copy
from typing import Any

import pytest
import torch
from cases import KINDS, KindCase
from torch import nn

from tailora import LoRAConfig, LoRALayer, LoRAModel
from tailora.core.spectra import EXACT, leading
from tailora.errors import TargetError

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def config(kind: KindCase, name: str, **changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": kind.r, "target_modules": ["target"], "init_lora_weights": name, **changes})


@kinds
@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_off_the_weight_computes_the_base_and_changes_no_weight(
    kind: KindCase, name: str, dtype: torch.dtype
) -> None:
    model, x = LoRAModel(kind.net(dtype), config(kind, name)), kind.batch(dtype)
    (layer,) = model.lora_layers.values()
    assert torch.equal(model(x), kind.net(dtype)(x))
    assert torch.equal(model.base_model.block["target"].weight, kind.net(dtype).block["target"].weight)
    assert layer.lora_A.any()
    assert layer.lora_B.any()
    assert layer.lora_A.dtype == torch.float32


@kinds
def test_pissa_takes_the_best_part_of_the_weight_group_by_group(kind: KindCase) -> None:
    model = LoRAModel(kind.net(), config(kind, "pissa"))
    (layer,) = model.lora_layers.values()
    base = model.base_model.block["target"]
    matrix = layer.kind.matrix(base, base.weight.detach())  # (groups, m, n)
    tail = torch.linalg.svdvals(matrix)[:, layer.r // layer.groups :]
    layer.start_A = layer.start_B = None
    left = (base.weight - layer.delta(base)).norm()
    torch.testing.assert_close(left, tail.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_off_the_weight_is_the_same_whatever_the_random_state(name: str) -> None:
    base = nn.Sequential(nn.Linear(EXACT + 60, EXACT + 90))

    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = LoRAModel(copy.deepcopy(base), LoRAConfig(r=4, init_lora_weights=name))
        return model.lora_layers["0"].state_dict()

    one, two = made(1), made(2)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (2, 300, 300)])
def test_leading_triplets_of_a_large_matrix_are_the_exact_ones(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows, columns = torch.linalg.qr(torch.randn(shape))[0], torch.linalg.qr(torch.randn(shape).mT)[0]
    size = min(shape[-2:])
    falling = 0.98 ** torch.arange(size)
    M = rows[..., :size] * falling @ columns[..., :size].mT
    found = leading(M, 8)
    torch.testing.assert_close(found.S, falling[:8].expand(found.S.shape), rtol=1e-5, atol=1e-5)
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(
        found.U * found.S[..., None, :] @ found.V, U[..., :8] * falling[:8] @ V[..., :8, :], rtol=1e-3, atol=1e-3
    )


def test_a_rank_that_a_start_cannot_take_is_refused_with_every_layer() -> None:
    base = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6), nn.Linear(6, 12))
    with pytest.raises(TargetError) as caught:
        LoRAModel(base, LoRAConfig(r=4, init_lora_weights="lora_ga"))
    assert "1: it takes 2r directions, r = 4, and there are 6; take r up to 3" in str(caught.value)
    assert "2: it takes" in str(caught.value)
    assert all(type(layer) is nn.Linear for layer in base)


def test_ids_and_groups_have_no_principal_components() -> None:
    for layer, reason in ((nn.Embedding(20, 12), "ids"), (nn.Conv1d(8, 8, 3, groups=2), "groups")):
        with pytest.raises(TargetError, match=reason):
            LoRAModel(nn.Sequential(layer), LoRAConfig(r=4, target_modules=["0"], init_lora_weights="eva"))


def test_a_weight_that_is_zero_starts_at_zero() -> None:
    base = nn.Linear(12, 10)
    nn.init.zeros_(base.weight)
    layer = LoRAModel(nn.Sequential(base), LoRAConfig(r=4, init_lora_weights="pissa")).lora_layers["0"]
    assert isinstance(layer, LoRALayer)
    assert not layer.lora_B.any()
