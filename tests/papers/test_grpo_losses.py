"""The losses and advantages of reinforcement learning against their equations, written out token by token."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import chat_model

from tailora.kernels.loss import OWN
from tailora.train.grpo import GRPO, SMALLEST_STD, ScoredCompletion, advantages_of
from tailora.train.loss import BatchLayout, make_batch

PROMPT = 4
LENGTHS = (6, 3)
ADVANTAGES = (0.8, -1.3)
BETA, LOW, HIGH, LONGEST = 0.3, 0.1, 0.25, 9


def log_probabilities(model: Any, ids: np.ndarray[Any, Any]) -> list[float]:
    """Of each token of the completion, at temperature 1."""
    tokens = torch.tensor(ids.astype(np.int64))
    logits = model(tokens[None]).logits[0].detach().double().log_softmax(-1)  # (length, vocabulary)
    return [float(logits[i - 1, tokens[i]]) for i in range(PROMPT, len(ids))]


def expected(loss: str, completions: list[tuple[list[float], list[float], list[float]]]) -> float:
    """completions: log-probabilities of the tokens by the model, the one that sampled, and the reference."""
    sums, lengths = list[float](), list[int]()
    for advantage, (policy, old, reference) in zip(ADVANTAGES, completions, strict=True):
        if loss == "rloo":  # arXiv:2402.14740, eq. 7 and 8: the probability of the whole completion
            ratio = math.exp(sum(policy) - sum(old))
            sums.append(min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage))
            lengths.append(1)
            continue
        terms = list[float]()
        for p, q, ref in zip(policy, old, reference, strict=True):
            ratio = math.exp(p - q)
            clipped = min(max(ratio, 1 - LOW), 1 + HIGH)  # arXiv:2503.14476, eq. 10: two bounds
            kl = math.exp(ref - p) - (ref - p) - 1  # arXiv:2402.03300, eq. 4
            # arXiv:2512.02556, section 3.1: the estimate is multiplied by the ratio, so that its gradient is unbiased
            terms.append(min(ratio * advantage, clipped * advantage) - BETA * ratio * kl)
        sums.append(sum(terms))
        lengths.append(len(terms))
    if loss == "grpo":  # arXiv:2402.03300, eq. 3
        return -sum(total / length for total, length in zip(sums, lengths, strict=True)) / len(sums)
    if loss == "dapo":  # arXiv:2503.14476, eq. 8
        return -sum(sums) / sum(lengths)
    if loss == "dr_grpo":  # arXiv:2503.20783, section 3.2 and listing 1: a constant instead of the length
        return -sum(sums) / LONGEST / len(sums)
    return -sum(sums) / len(sums)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "rloo"])
def test_losses_are_those_of_their_papers(loss: str) -> None:
    model, random, layout = chat_model(), np.random.default_rng(0), BatchLayout(False, OWN, 0)
    examples, completions = [], []
    for advantage, length in zip(ADVANTAGES, LENGTHS, strict=True):
        ids = random.integers(300, size=PROMPT + length).astype(np.int32)
        policy = log_probabilities(model, ids)
        old, reference = ([p + random.normal(0, 0.3) for p in policy] for _ in range(2))
        completions.append((policy, old, reference))
        example = ScoredCompletion.of_text(ids, np.arange(len(ids)) >= PROMPT)
        examples.append(replace(example, advantage=advantage, sampled=old, old=old, reference=reference))
    task = GRPO(loss, 0.0 if loss == "rloo" else BETA, LOW, HIGH, max_completion_length=LONGEST)
    losses = task.outputs(model, make_batch(examples, layout, model.device, task), layout).losses
    value = losses.sum().item() / sum(map(task.divisor, examples))
    assert value == pytest.approx(expected(loss, completions), rel=1e-5)


def test_advantages_are_those_of_their_papers() -> None:
    rewards = [1.0, 0.0, 0.5, 0.2]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3)
    relative = [(reward - mean) / (std + SMALLEST_STD) for reward in rewards]  # arXiv:2402.03300, section 4.1.2
    others = [reward - (sum(rewards) - reward) / 3 for reward in rewards]  # arXiv:2402.14740, eq. 8
    constant = [reward - mean for reward in rewards]  # arXiv:2503.20783, section 3.2
    groups = np.array([rewards])
    assert advantages_of(groups, "grpo")[0] == pytest.approx(relative)
    assert advantages_of(groups, "rloo")[0] == pytest.approx(others)
    assert advantages_of(groups, "dr_grpo", "none")[0] == pytest.approx(constant)
