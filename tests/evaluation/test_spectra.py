"""Numbers that are known for spectra that are known."""

import math

import pytest
import torch
from torch import Tensor

from tailora.core.low_rank import Factors, product_spectrum
from tailora.evaluation.spectral import (
    chance_overlap,
    effective_rank,
    inner_product,
    mean_singular_values,
    stable_rank,
    subspace_overlap,
    update_directions,
)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(m, k, generator=torch.Generator().manual_seed(seed))).Q
    return basis


def of_spectrum(*values: float, m: int = 20, n: int = 30) -> Factors:
    U, V = orthonormal(m, len(values)), orthonormal(n, len(values), 1)
    return Factors((U * torch.tensor(values))[None], V.mT[None])


@pytest.mark.parametrize("r", [1, 3, 8])
def test_equal_values_use_all_of_the_rank(r: int) -> None:
    S = product_spectrum(of_spectrum(*[2.5] * r)).S
    assert effective_rank(S) == pytest.approx(r)
    assert stable_rank(S) == pytest.approx(r)


def test_unequal_values_use_less_and_scale_does_not_matter() -> None:
    shares = [3 / 4, 1 / 4]
    by_hand = math.exp(-sum(share * math.log(share) for share in shares))
    for scale in (1.0, 1e-4):
        S = product_spectrum(of_spectrum(3 * scale, scale)).S
        assert effective_rank(S) == pytest.approx(by_hand)
        assert stable_rank(S) == pytest.approx((9 + 1) / 9)


def test_a_product_of_higher_rank_than_it_needs_uses_what_it_needs() -> None:
    B, A = torch.randn(20, 1), torch.randn(1, 30)
    S = product_spectrum(Factors(torch.cat([B, B, B], 1)[None], torch.cat([A, A, -A])[None])).S
    assert effective_rank(S) == pytest.approx(1, abs=1e-4)
    assert stable_rank(S) == pytest.approx(1)


def test_nothing_has_no_rank() -> None:
    S = torch.zeros(1, 4)
    assert effective_rank(S) == stable_rank(S) == 0


def test_equal_subspaces_overlap_by_one_and_orthogonal_ones_not_at_all() -> None:
    basis = orthonormal(20, 6)
    turned = basis[:, :3] @ orthonormal(3, 3, 5)
    assert subspace_overlap(basis[:, :3], turned) == pytest.approx(1)
    assert subspace_overlap(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-10)
    assert subspace_overlap(basis[:, :2], basis) == pytest.approx(1)  # one lies within the other
    assert subspace_overlap(basis[:, :2], basis[:, 1:4]) == pytest.approx(0.5)
    assert subspace_overlap(basis[:, :0], basis) == 0


def test_chance_is_what_random_subspaces_overlap_by() -> None:
    found = [subspace_overlap(orthonormal(40, 4, seed), orthonormal(40, 6, seed + 1000)) for seed in range(200)]
    assert sum(found) / len(found) == pytest.approx(chance_overlap(orthonormal(40, 4), orthonormal(40, 6)), rel=0.1)


def test_directions_are_those_with_more_than_rounding() -> None:
    factors = of_spectrum(3.0, 2.0)
    padded = Factors(torch.cat([factors.B, torch.zeros(1, 20, 2)], 2), torch.cat([factors.A, torch.randn(1, 2, 30)], 1))
    written, read = update_directions(product_spectrum(padded))
    assert [round(float(each.square().sum())) for each in (written, read)] == [2, 2]
    assert subspace_overlap(written.float(), orthonormal(20, 2)) == pytest.approx(1, abs=1e-5)
    assert subspace_overlap(read.float(), orthonormal(30, 2, 1)) == pytest.approx(1, abs=1e-5)
    assert subspace_overlap(written, written) == pytest.approx(1)


def test_groups_overlap_block_by_block() -> None:
    one, two = orthonormal(20, 4), orthonormal(20, 4, 2)
    first = torch.stack([one[:, :2], two[:, :2]])
    second = torch.stack([one[:, :2], two[:, 2:]])  # the same in one block, orthogonal in the other
    assert subspace_overlap(first, second) == pytest.approx(0.5)
    assert chance_overlap(first, second) == pytest.approx(2 / 20)


def test_the_inner_product_is_that_of_the_dense_updates() -> None:
    first, second = (
        Factors(torch.randn(3, 7, 2, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)) for _ in range(2)
    )
    assert inner_product(first, second) == pytest.approx(float((first.dense * second.dense).sum()))


def test_a_row_of_singular_values_for_several_groups_has_their_energy() -> None:
    S = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    row = mean_singular_values(S)
    assert float(row.square().sum()) * len(S) == pytest.approx(float(S.square().sum()))
