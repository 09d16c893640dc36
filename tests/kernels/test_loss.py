"""Losses and gradients of the kernels are torch's on full logits, in chunks of any size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tailora.core.config import LoRAConfig
from tailora.kernels.loss import FEWEST_ROWS, cross_entropy, frozen_head, recomputed_head
from tailora.model import LoRAModel

HIDDEN, VOCABULARY = 16, 301
Losses = Callable[[Tensor, Tensor, nn.Linear], Tensor]
KERNELS: dict[str, Losses] = {
    "frozen": lambda hidden, targets, head: frozen_head(hidden, targets, head.weight, head.bias),
    "recomputed": lambda hidden, targets, head: recomputed_head(hidden, targets, head, VOCABULARY),
    "logits": lambda hidden, targets, head: cross_entropy(head(hidden), targets),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows, widened three rows at a time."""
    monkeypatch.setattr("tailora.kernels.loss.CHUNK_BYTES", 0)
    monkeypatch.setattr("tailora.kernels.loss.BLOCK_ELEMENTS", 3 * VOCABULARY // torch.get_num_threads() + 1)


def plain(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def head_of(dtype: torch.dtype, bias: bool = False, trained: bool = False) -> nn.Linear:
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(trained)


def both(losses_of: Losses, rows: int, head: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, gradient by the states and by whatever of `head` is trained: found, and expected. Weights differ."""
    hidden, weights = torch.randn(rows, HIDDEN, dtype=dtype) * 3, torch.rand(rows).to(dtype) - 0.3
    targets = torch.randint(VOCABULARY, (rows,))
    results = []
    for each in (losses_of, plain):
        leaf = hidden.clone().requires_grad_()
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        losses = each(leaf, targets, head)
        results.append([losses.detach(), *torch.autograd.grad((losses * weights).sum(), [leaf, *trained])])
    return results[0], results[1]


@pytest.mark.parametrize("rows", [0, 1, FEWEST_ROWS, 2 * FEWEST_ROWS + 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "trained"), [*((kernel, False) for kernel in KERNELS), ("recomputed", True)])
def test_losses_and_gradients_are_those_of_torch(kernel: str, trained: bool, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    found, expected = both(KERNELS[kernel], rows, head_of(torch.float64, bias, trained), torch.float64)
    assert len(found) == 2 + trained * (1 + bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_adapted_head_gets_its_gradient_by_a_b_and_the_learned_scale() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(head_of(torch.float64))
    config = LoRAConfig(r=4, target_modules=["0"], learn_scaling=True)
    model = LoRAModel(base, config).double()
    nn.init.normal_(model.lora_layers["0"].lora_B)

    class Head(nn.Module):  # all that is trained, where `both` looks for it
        def __init__(self) -> None:
            super().__init__()
            self.trained = model.lora_layers

        def forward(self, hidden: Tensor) -> Any:
            return model(hidden)

    found, expected = both(KERNELS["recomputed"], 2 * FEWEST_ROWS + 5, Head(), torch.float64)
    assert len(found) == 2 + 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dropout_in_the_head_is_the_same_in_the_recomputation() -> None:
    head = nn.Sequential(nn.Dropout(0.5), head_of(torch.float64))
    targets = torch.randint(VOCABULARY, (FEWEST_ROWS,))
    hidden = torch.randn(FEWEST_ROWS, HIDDEN, dtype=torch.float64)
    gradients = []
    for losses_of in (KERNELS["recomputed"], plain):
        leaf = hidden.clone().requires_grad_()
        torch.manual_seed(0)
        losses = losses_of(leaf, targets, head)
        torch.manual_seed(1)
        gradients += torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def errors(losses_of: Losses, weights: Tensor) -> tuple[float, float]:
    """Of losses and gradients in bfloat16 against float64, relative to their norm."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(len(weights), HIDDEN).bfloat16() * 3, torch.randint(VOCABULARY, (len(weights),))
    head = head_of(torch.bfloat16)
    results = []
    for each, dtype in ((losses_of, torch.bfloat16), (plain, torch.float64)):
        leaf = hidden.to(dtype).requires_grad_()
        losses = each(leaf, targets, head.to(dtype))
        (gradient,) = torch.autograd.grad(losses @ weights.to(losses), leaf)
        results.append((losses.detach().double(), gradient.double()))
    relative = [float((found - true).norm() / true.norm()) for found, true in zip(*results, strict=True)]
    return relative[0], relative[1]


@pytest.mark.parametrize(
    ("losses_of", "at_most"),
    [
        (KERNELS["recomputed"], 1.1),  # one rounding more, of the logits' gradient
        (KERNELS["logits"], 1.1),
        (lambda hidden, targets, head: frozen_head(hidden, targets, head.weight, None, 1 / 700), 1.02),
        (KERNELS["frozen"], 1.4),  # one rounding more, of the states' gradient
    ],
    ids=["recomputed", "logits", "frozen, gradient known", "frozen"],
)
def test_half_precision_is_as_near_to_the_truth_as_torch_is(losses_of: Losses, at_most: float) -> None:
    weights = torch.full((2 * FEWEST_ROWS + 5,), 1 / 700)
    (loss, gradient), (usual_loss, usual_gradient) = errors(losses_of, weights), errors(plain, weights)
    assert loss <= 1.02 * usual_loss
    assert gradient <= at_most * usual_gradient
    assert usual_gradient < 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_are_the_same_without_a_gradient(kernel: str) -> None:
    hidden, targets = torch.randn(FEWEST_ROWS + 1, HIDDEN), torch.randint(VOCABULARY, (FEWEST_ROWS + 1,))
    head = head_of(torch.float32)
    with_one = KERNELS[kernel](hidden.clone().requires_grad_(), targets, head)
    with torch.no_grad():
        without = KERNELS[kernel](hidden, targets, head)
    assert with_one.requires_grad
    assert torch.equal(without, with_one.detach())


@pytest.mark.parametrize("kernel", KERNELS)
def test_impossible_tokens_and_huge_logits_give_finite_losses(kernel: str) -> None:
    head = head_of(torch.float32, bias=True)
    head.bias[0] = float("-inf")
    hidden = (torch.randn(3, HIDDEN) * 1e4).requires_grad_()
    losses = KERNELS[kernel](hidden, torch.tensor([1, 2, 3]), head)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), plain(hidden, torch.tensor([1, 2, 3]), head).detach())
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return output


@pytest.mark.parametrize(("kernel", "rows_at_once"), [("frozen", 64), ("recomputed", 64), ("logits", 400)])
def test_logits_of_a_chunk_are_all_that_exists(kernel: str, rows_at_once: int) -> None:
    hidden, targets = torch.randn(400, HIDDEN, requires_grad=True), torch.randint(VOCABULARY, (400,))
    head = head_of(torch.float32)
    with Largest() as seen:
        KERNELS[kernel](hidden, targets, head).sum().backward()
        with torch.no_grad():
            KERNELS[kernel](hidden, targets, head)
    assert seen.elements == rows_at_once * VOCABULARY


def test_logits_are_left_alone_without_a_gradient() -> None:
    logits = torch.randn(5, 11)
    before = logits.clone()
    cross_entropy(logits, torch.arange(5))
    assert torch.equal(logits, before)


def test_a_head_that_asks_for_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="use recomputed_head"):
        KERNELS["frozen"](torch.randn(2, HIDDEN), torch.zeros(2).long(), head_of(torch.float32, trained=True))


@pytest.mark.parametrize("kernel", ["recomputed", "logits"])
def test_a_second_backward_over_spent_logits_is_refused(kernel: str) -> None:
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    loss = KERNELS[kernel](hidden, torch.zeros(3, dtype=torch.long), head_of(torch.float32)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has already run"):
        loss.backward()


def test_a_second_backward_over_a_frozen_head_gives_the_same_gradient() -> None:
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    loss = KERNELS["frozen"](hidden, torch.zeros(3, dtype=torch.long), head_of(torch.float32)).sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_of_the_gradient_is_refused(kernel: str) -> None:
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    losses = KERNELS[kernel](hidden, torch.zeros(3, dtype=torch.long), head_of(torch.float32))
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)


def test_a_model_that_needs_its_logits_in_the_backward_is_not_given_a_wrong_gradient() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(leaf.tanh(), torch.zeros(3, dtype=torch.long)).sum().backward()
