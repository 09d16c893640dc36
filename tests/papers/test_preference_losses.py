"""The losses of preferences against their equations, written out with the numbers of each token."""

import math

import pytest
import torch
from torch import Tensor

from tailora.train.preference import KTO, LOSSES, Pairs, Replies

# log-probabilities of the tokens of two pairs, by the model and by the reference
CHOSEN = [[-0.5, -1.0, -0.2], [-2.0]]
REJECTED = [[-1.5, -0.1], [-0.3, -0.4, -0.5]]
CHOSEN_REFERENCE = [[-0.7, -1.1, -0.1], [-1.2]]
REJECTED_REFERENCE = [[-1.0, -0.2], [-0.6, -0.1, -0.9]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


def replies() -> Replies:
    def sums(first: list[list[float]], second: list[list[float]]) -> Tensor:
        return torch.tensor([[sum(one), sum(two)] for one, two in zip(first, second, strict=True)], dtype=torch.float64)

    policy = sums(CHOSEN, REJECTED)
    lengths = torch.tensor([[len(one), len(two)] for one, two in zip(CHOSEN, REJECTED, strict=True)])
    return Replies(policy, policy - sums(CHOSEN_REFERENCE, REJECTED_REFERENCE), lengths)


def expected(loss: str, pair: int, beta: float, smoothing: float, gamma: float) -> float:
    """pi(y|x) is the product over tokens; p(y|x) of SimPO and ORPO is its root of the number of tokens."""
    chosen, rejected = CHOSEN[pair], REJECTED[pair]
    ratios = sum(chosen) - sum(CHOSEN_REFERENCE[pair]), sum(rejected) - sum(REJECTED_REFERENCE[pair])
    means = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
    if loss == "dpo":  # arXiv:2305.18290, eq. 7; Mitchell, eq. 3
        margin = beta * (ratios[0] - ratios[1])
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    if loss == "ipo":  # arXiv:2310.12036, eq. 17, per token
        return (ratios[0] / len(chosen) - ratios[1] / len(rejected) - 1 / (2 * beta)) ** 2
    if loss == "simpo":  # arXiv:2405.14734, eq. 6
        margin = beta * means[0] - beta * means[1] - gamma
        return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]  # arXiv:2403.07691, eq. 4
    return -means[0] - beta * log_sigmoid(math.log(odds[0] / odds[1]))  # eq. 6 and 7


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (2.0, 0.2)])
def test_losses_of_pairs_are_those_of_their_papers(loss: str, beta: float, smoothing: float) -> None:
    task = Pairs(loss, beta, label_smoothing=smoothing, simpo_gamma=0.7)
    losses = LOSSES[loss](replies(), task)
    assert losses.tolist() == pytest.approx([expected(loss, pair, beta, smoothing, 0.7) for pair in range(2)], rel=1e-9)


@pytest.mark.parametrize("certain", [0, 1])
def test_a_reply_that_the_model_is_certain_of_has_finite_odds(certain: int) -> None:
    """Of a short reply p becomes 1 in float32, whose odds p / (1 - p) are infinite."""
    log_p = torch.full((1, 2), -3.0)
    log_p[0, certain] = 0.0
    log_p.requires_grad_()
    (loss,) = LOSSES["orpo"](Replies(log_p, log_p, torch.ones(1, 2)), Pairs("orpo", 0.1))
    (gradient,) = torch.autograd.grad(loss, log_p)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_the_chosen_reply_is_also_learned_with_a_weight() -> None:
    """arXiv:2404.19733, eq. 1: - alpha log pi(y|x) / |y|."""
    without, with_weight = (Pairs("dpo", 0.1, sft_weight=weight)._outputs(replies()).losses for weight in (0.0, 0.5))
    means = [sum(tokens) / len(tokens) for tokens in CHOSEN]
    assert (with_weight - without).tolist() == pytest.approx([-0.5 * mean for mean in means])


@pytest.mark.parametrize("others", [[0.4, 0.8], [-0.4, -0.8]])
def test_the_loss_of_kto_is_that_of_its_paper(others: list[float]) -> None:
    """arXiv:2402.01306, eq. 8, with weights of 1: z0 is the mean log-ratio of other replies, at least 0."""
    beta, ratios, desirable = 0.3, [1.5, -0.7], [1.0, 0.0]
    point = max(sum(others) / 2, 0)
    value = [sigmoid(beta * (ratios[0] - point)), sigmoid(beta * (point - ratios[1]))]
    zeros = [0.0, 0.0]
    scores = torch.tensor([zeros, zeros, [beta * ratio for ratio in ratios], others, desirable]).double().T
    evaluation = KTO(beta).evaluation([None, None], None, scores.numpy())  # type: ignore[arg-type]
    assert evaluation.sums.tolist() == pytest.approx([1 - value[0], 1 - value[1]])
