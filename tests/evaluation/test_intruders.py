"""A planted intruder is found, what is no intruder is not, and the count is that of the full decomposition."""

import pytest
import torch
from torch import Tensor

from tailora.core.low_rank import EXACT
from tailora.evaluation import spectral

SHAPES = [(60, 40), (40, 60), (EXACT + 44, EXACT + 84), (EXACT + 84, EXACT + 44)]  # exact, and by iteration


def weight(m: int, n: int) -> Tensor:
    """Of a spectrum that falls as slowly as those of trained weights do."""
    generator = torch.Generator().manual_seed(3)
    U, _, V = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    return U * torch.arange(1, min(m, n) + 1).float().pow(-0.5) @ V


def spread(length: int) -> Tensor:
    """A direction that is none of anybody's."""
    return torch.nn.functional.normalize(torch.randn(length, 1, generator=torch.Generator().manual_seed(9)), dim=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    U = torch.linalg.svd(W.double(), full_matrices=False).U
    u = torch.linalg.qr(torch.randn(shape[0], 5, dtype=torch.float64)).Q
    found = spectral.cosines_with(W)(u.float())
    torch.testing.assert_close(
        found.double().square().sort(0).values, (U.mT @ u).square().sort(0).values, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_intruder_is_found_and_only_that(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    planted = 2 * spread(shape[0]) @ spread(shape[1]).mT  # above all of W's singular values
    count = spectral.intruder_counter(W)
    assert count(W) == 0
    assert count(W + planted) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_stronger_weights_and_small_noise_are_no_intruders(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    count = spectral.intruder_counter(W)
    assert count(3 * W) == 0
    noise = spectral.random_update(*shape, 8, norm=0.01).dense[0]
    assert count(W + noise) == 0


@pytest.mark.parametrize("norm", [0.3, 1.0, 3.0, 10.0])
def test_the_short_way_and_the_full_decomposition_count_as_many(norm: float) -> None:
    W = weight(EXACT + 44, EXACT + 84)
    changed = W + spectral.random_update(*W.shape, 6, norm=norm).dense[0]
    old, new = (torch.linalg.svd(each.double(), full_matrices=False).U for each in (W, changed))
    by_hand = int(((old.mT @ new[:, :10]).abs().amax(0) < 0.5).sum())
    assert spectral.intruder_counter(W)(changed) == by_hand
    assert spectral.intruder_counter(W, full_size=EXACT)(changed) == by_hand
    assert by_hand >= 3 or norm < 3


def test_a_weight_without_intruders_is_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Tensor) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(spectral, "cosines_with", refused)
    W = weight(EXACT + 44, EXACT + 84)
    assert (
        spectral.intruder_counter(W, full_size=EXACT)(W + spectral.random_update(*W.shape, 6, norm=0.1).dense[0]) == 0
    )


def test_a_random_update_has_the_shape_rank_and_norm_and_is_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (spectral.random_update(30, 20, 4, norm=0.7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.dense, again.dense)
    assert not torch.equal(first.dense, other.dense)
    assert first.dense.shape == (1, 30, 20)
    assert float(first.dense.norm()) == pytest.approx(0.7, rel=1e-5)
    assert int(torch.linalg.matrix_rank(first.dense[0])) == 4
