"""What is cheap to compute again: the same bits, in less memory, for any architecture; changes in place; dropout."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kept_bytes import kept_bytes
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from tailora import LoRAConfig, LoRAModel
from tailora.core.device import HALF
from tailora.core.float32_products import float32_products
from tailora.kernels import recompute
from tailora.kernels.recompute import recomputed

SHARES = {  # of what autograd keeps by itself
    "LlamaForCausalLM": 0.7,
    "GPT2LMHeadModel": 0.62,  # LayerNorm, Conv1D, an activation of seven functions
    "Gemma3ForCausalLM": 0.7,  # norms of q and k
    "MixtralForCausalLM": 0.8,  # experts
    "BertForSequenceClassification": 0.8,
}


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LEAST_BYTES", 0)


def gradients_of(model: LoRAModel, ids: Tensor, again: bool, tokens: int | None) -> tuple[list[Tensor], int]:
    """Returns the gradients of the adapter, and what was kept for them."""
    model.lora_layers.zero_grad()
    torch.manual_seed(1)
    with recomputed() if again else nullcontext() as recomputing, float32_products(tokens):
        kept = kept_bytes(lambda: model(input_ids=ids).logits.float().square().sum(), model.base_model, recomputing)
        torch.manual_seed(2)
        model(input_ids=ids).logits.float().square().sum().backward()
    return [parameter.grad for parameter in model.lora_layers.parameters() if parameter.grad is not None], kept


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("class_name", SHARES)
def test_gradients_are_the_same_bits_from_less_memory(class_name: str, dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    model = LoRAModel(tiny_model(class_name).to(dtype), LoRAConfig(r=4, lora_dropout=dropout)).train()
    for parameter in model.lora_layers.parameters():
        parameter.data.normal_(std=0.1)
    ids = torch.randint(80, (2, 30))
    for tokens in (None, 4) if dtype in HALF else (None,):
        expected, usual = gradients_of(model, ids, False, tokens)
        found, kept = gradients_of(model, ids, True, tokens)
        assert len(found) == len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert kept < SHARES[class_name] * usual


def kept_of(function: Any, *tensors: Tensor) -> tuple[Tensor, int]:
    """Returns the result of a function, and the bytes that are kept for its backward beyond the tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in tensors}
    with recomputed() as recomputing:
        y = function(*tensors)
        return y, sum(storage.nbytes() for key, storage in recomputing.storages() if key not in known)


def test_a_sum_of_two_tensors_that_nothing_keeps_is_kept_itself() -> None:
    """Or a layer would keep the outputs of all layers before it, to add them up again."""
    weight = nn.Parameter(torch.randn(8, 8))

    def residual(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x + x.cos().detach()  # which nothing keeps
            x = F.linear(x, weight)
        return x

    _, kept = kept_of(residual, torch.randn(16, 8))
    assert kept == 5 * 16 * 8 * 4 + weight.nbytes


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, torch.relu, torch.exp])
def test_a_result_that_the_function_itself_saves_is_computed_again(function: Any) -> None:
    x = torch.randn(16, 8, requires_grad=True)
    y, kept = kept_of(lambda x: function(x.square()), x)
    assert kept == 0
    y.sum().backward()
    assert x.grad is not None
    x2 = x.detach().requires_grad_()
    function(x2.square()).sum().backward()
    assert torch.equal(x.grad, x2.grad)


def test_dropout_draws_its_mask_again_and_leaves_the_random_numbers_as_torch_does() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        if again:
            y, kept = kept_of(lambda x: F.dropout(x, 0.3).square(), x)
            assert kept < 8192  # the state of the random numbers
        else:
            y = F.dropout(x, 0.3).square()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        results.append((y, gradient, torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_change_in_place_comes_after_what_follows_from_the_old_values() -> None:
    """torch would keep silu(x) z and z, which do not change."""
    x, weight = torch.randn(16, 8), nn.Parameter(torch.randn(8, 8))

    def changed(x: Tensor) -> Tensor:
        h = x.bfloat16()
        y = F.linear(h.float() * 2, weight)
        h.add_(1)
        return y + h.sum()

    changed(x).sum().backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None
    kept_of(changed, x)[0].sum().backward()
    assert torch.equal(weight.grad, expected)


def test_a_change_of_what_is_kept_itself_is_an_error_as_in_torch() -> None:
    x = torch.randn(16, 8, requires_grad=True)
    y = x * 1
    with recomputed():
        z = F.silu(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match=r"\(16, 8\).*changed in place.*--fast off"):
        z.sum().backward()


def test_each_tensor_is_computed_once_and_nothing_stays() -> None:
    calls = []
    x, weights = torch.randn(16, 8, requires_grad=True), [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    with recomputed() as recomputing:
        normed = F.layer_norm(x, (8,))
        recipe = vars(normed.untyped_storage())["recipe"]
        recipe.function = lambda *args, **kwargs: calls.append(1) or F.layer_norm(*args, **kwargs)
        y = sum(F.linear(normed, weight) for weight in weights)
        del normed
        y.sum().backward(retain_graph=True)
        assert len(calls) == 1
        assert recipe.value is None
        y.sum().backward()  # as often as one asks
        del y, recipe
        gc.collect()
        assert not list(recomputing.storages())
    assert len(_get_current_function_mode_stack()) == 0
