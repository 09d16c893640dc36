"""What is measured of adapters and searches, by the definitions cited."""

import math
from itertools import combinations, product

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.optimize import minimize
from scipy.special import expit

from tailora.evaluation.answer_faults import NGRAM, WINDOW, repetition
from tailora.evaluation.classification import _calibration
from tailora.evaluation.judge import win_rate_at_equal_length
from tailora.evaluation.rewards import pass_at_k
from tailora.evaluation.spectral import effective_rank, intruder_counter, stable_rank
from tailora.study.optuna_study import importances


@pytest.mark.parametrize("planted", [0, 1, 3])
@pytest.mark.parametrize("full_size", [1024, 32])  # by all of W's vectors, and by those near first
def test_intruders_are_leading_vectors_that_are_near_to_none_of_the_base_s(planted: int, full_size: int) -> None:
    """arXiv:2410.21228, alg. 1: of the k leading left vectors of W + dW those with max_j |<u_j, v_i>| < epsilon."""
    torch.manual_seed(0)
    m, n, k, epsilon = 120, 100, 10, 0.5
    W, dW = torch.randn(m, n) / math.sqrt(n), 0.05 * torch.randn(m, n) / math.sqrt(n)
    directions = torch.linalg.qr(torch.randn(m, planted))[0]
    dW += 4 * directions @ torch.linalg.qr(torch.randn(n, planted))[0].T
    old, new = (torch.linalg.svd(each, full_matrices=False)[0] for each in (W, W + dW))
    by_definition = sum(all(abs(float(old[:, j] @ new[:, i])) < epsilon for j in range(old.shape[1])) for i in range(k))
    assert intruder_counter(W, k, epsilon, full_size=full_size)(W + dW) == by_definition
    assert by_definition >= planted


def test_ranks_that_are_no_whole_numbers() -> None:
    """||A||_F^2 / ||A||^2 (arXiv:math/0503442, sec. 1), exp(H(sigma / sum sigma)) (Roy and Vetterli 2007, def. 1)."""
    S = torch.tensor([4.0, 2.0, 2.0, 0.0])
    assert stable_rank(S) == pytest.approx((16 + 4 + 4) / 16)
    assert effective_rank(S) == pytest.approx(math.exp(-0.5 * math.log(0.5) - 2 * 0.25 * math.log(0.25)))


def test_a_setting_is_important_by_how_the_best_quarter_differs_in_it() -> None:
    """E_q[(p / q - 1)^2] of the best trials' values p from all trials' q (PED-ANOVA, arXiv:2304.10255, thm. 1)."""
    values = {"much": "abcd", "some": "ab", "nothing": "ab"}
    space = {name: CategoricalDistribution(tuple(each)) for name, each in values.items()}
    best = {("a", "a"): 20, ("a", "b"): 10, ("b", "a"): 10}  # of 20 times that the two meet: 80 of 320 trials
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def trials(state_of_d: TrialState, loss_of_d: float) -> list[FrozenTrial]:
        made = []
        for number, (much, some, nothing) in product(range(20), product(*values.values())):
            loss = loss_of_d if much == "d" else float(number >= best.get((much, some), 0))
            state = state_of_d if much == "d" else TrialState.COMPLETE
            chosen = {"much": much, "some": some, "nothing": nothing}
            made.append(create_trial(params=chosen, distributions=space, value=loss, state=state))
        return made

    found = importances(trials(TrialState.COMPLETE, 1.0))
    # E_q is (2^2 + 0^2 + 1 + 1) / 4 = 1.5, (.5^2 + .5^2) / 2 = .25 and 0; Optuna smooths p and q
    assert found["much"] > 2 * found["some"] > 0.2
    assert found["nothing"] < 0.01
    assert sum(found.values()) == pytest.approx(1)
    assert importances(trials(TrialState.PRUNED, 0.0)) == found  # worse, however good its last loss was


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    """arXiv:1706.04599, eq. 3: ECE = sum over bins of |B| / n * |acc(B) - conf(B)|, with bins of equal width."""
    confidence = np.array([0.62, 0.68, 0.66, 0.93, 0.97])
    right = np.array([True, False, False, True, True])
    expected = 3 / 5 * abs(1 / 3 - (0.62 + 0.68 + 0.66) / 3) + 2 / 5 * abs(1 - 0.95)
    assert _calibration(confidence, right)["ece"] == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    """arXiv:2107.03374, eq. 1: 1 - C(n - c, k) / C(n, k), which is the mean over all subsets of k of n samples."""
    scores = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=float)
    expected = [np.mean([max(subset) for subset in combinations(row, k)]) for row in scores]
    np.testing.assert_allclose(pass_at_k(scores, k), expected)
    scores[2, 5] = np.nan  # five are known
    of_known = np.mean([max(subset) for subset in combinations(scores[2, :5], k)]) if k < 6 else np.nan
    np.testing.assert_allclose(pass_at_k(scores, k)[2], of_known)


@pytest.mark.parametrize("text", ["", "abcdefg", "abcdefgh", "ab" * 60, "abcdefghij" * 40, "x" + "abc" * 5])
def test_repetition_is_the_share_of_ngrams_that_occurred_before(text: str) -> None:
    """arXiv:1908.04319, seq-rep-n: 1 - |unique n-grams| / |n-grams|, of the end of a text."""
    end = text[-WINDOW:]
    ngrams = [end[i:][:NGRAM] for i in range(len(end)) if len(end[i:]) >= NGRAM]
    old = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams))
    assert repetition(text) == pytest.approx(old / max(1, len(ngrams)))


@pytest.mark.parametrize("is_separable", [False, True])
def test_win_rate_at_equal_length(is_separable: bool) -> None:
    """logit P(win) = a + b tanh(difference / sd), at 0 (arXiv:2404.04475, the length term), with a weak prior."""
    random = np.random.default_rng(0)
    longer = random.normal(50, 100, 3000).round()
    x = np.tanh(longer / longer.std())
    wins = (x > 0).astype(float) if is_separable else (random.random(3000) < expit(0.4 + 2 * x)).astype(float)
    wins[:100] = 0.5 if not is_separable else wins[:100]

    def loss(w: np.ndarray) -> float:
        p = expit(w[0] + w[1] * x).clip(1e-15, 1 - 1e-15)
        return float(-(wins * np.log(p) + (1 - wins) * np.log(1 - p)).sum() + 0.005 * (w**2).sum())

    found = win_rate_at_equal_length(wins, longer, np.arange(3000))
    assert found is not None
    rate = found.value
    assert rate == pytest.approx(expit(minimize(loss, np.zeros(2)).x[0]), abs=1e-3)
    assert is_separable or rate == pytest.approx(expit(0.4), abs=0.03)
    opposite = win_rate_at_equal_length(1 - wins, -longer, np.arange(3000))
    assert opposite == pytest.approx((1 - rate, 1 - found.high, 1 - found.low))
    assert win_rate_at_equal_length(wins, abs(longer) + 1, np.arange(3000)) is None
    few = win_rate_at_equal_length([1, 0, 1, 1], [0, 0, 0, 0], range(4))
    assert few is not None
    assert few.value == pytest.approx(0.75, abs=0.01)


def test_the_interval_of_the_win_rate_at_equal_length_covers_it() -> None:
    """Sandwich over clusters (Liang and Zeger, Biometrika 73, 1986): each prompt of 40 is asked twice."""
    random, inside = np.random.default_rng(1), 0
    for _ in range(400):
        longer = random.normal(30, 100, 40)
        x = np.tanh(longer / longer.std())
        wins = (random.random(40) < expit(0.4 + 1.5 * x)).astype(float)
        twice = win_rate_at_equal_length(np.repeat(wins, 2), np.repeat(longer, 2), np.repeat(range(40), 2))
        assert twice is not None
        inside += twice.low < expit(0.4) < twice.high
    assert 0.92 < inside / 400 < 0.98
