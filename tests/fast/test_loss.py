import pytest
import torch
from torch.nn import functional as F

from tailora.fast.loss import ROWS, cross_entropy


@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_are_those_of_torch(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 16, dtype=dtype), torch.randn(300, 16, dtype=dtype)
    targets = torch.randint(300, (rows,))
    results = []
    for losses_of in (cross_entropy, lambda x, y: F.cross_entropy(x.float(), y, reduction="none")):
        leaf = hidden.clone().requires_grad_()
        losses = losses_of(leaf @ weight.T, targets)
        (losses.sum() / 7).backward()
        results.append((losses.detach(), leaf.grad.float()))
    (losses, gradient), (expected, expected_gradient) = results
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


def test_logits_are_left_alone_without_a_gradient() -> None:
    logits = torch.randn(5, 11)
    before = logits.clone()
    cross_entropy(logits, torch.arange(5))
    assert torch.equal(logits, before)


def test_a_second_backward_is_refused() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(leaf * 2, torch.zeros(3, dtype=torch.long)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already sent backward"):
        loss.backward()


def test_a_model_that_needs_its_logits_in_the_backward_is_not_given_a_wrong_gradient() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(leaf.tanh(), torch.zeros(3, dtype=torch.long)).sum().backward()
