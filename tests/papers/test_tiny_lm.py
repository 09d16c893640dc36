"""Experiment 6 in small: fewer learning rates, steps and ranks than benchmarks/studies/tiny_lm.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.studies import claims, markov

BASE_STEPS, STEPS = 300, 80
OCTAVES = {  # of the learning rates that an arm tries
    "r1": (-9, -7, -5),
    "r8": (-10, -7),
    "r64": (-9, -7, -5),
    "full": (-11, -9, -7),
    "attention": (-7, -6),
    "mlp": (-7,),
    "dora": (-7,),
    "pissa": (-10, -8),
}


@pytest.fixture(scope="module")
def losses() -> dict[str, dict[int, float]]:
    with torch.random.fork_rng():
        base = markov.pretrained(BASE_STEPS)
        return {
            arm: {
                octave: markov.held_out_loss(markov.train_arm(base, markov.ARMS[arm], 2.0**octave, STEPS))
                for octave in rates
            }
            for arm, rates in OCTAVES.items()
        }


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.__name__)
def test_the_tiny_lm_shows_what_is_stated(claim: Callable[..., Any], losses: dict[str, dict[int, float]]) -> None:
    found = claim(losses)
    assert found.holds, f"{found.statement}: found {found.found}, in {losses}"


def test_the_texts_follow_the_table_and_a_quarter_of_its_rows_is_new() -> None:
    old, new = markov.table(), markov.new_table()
    torch.testing.assert_close(new.sum(-1), torch.ones(markov.WORDS, markov.WORDS))
    share = float((old != new).any(-1).double().mean())
    assert share == pytest.approx(markov.REPLACED, abs=0.04)
    ids = markov.texts(new, 2000, torch.Generator().manual_seed(9))
    assert (ids[:, -1] == markov.END).all()
    assert ids[:, :-1].max() < markov.WORDS
    contexts, following = (ids[:, :-3] * markov.WORDS + ids[:, 1:-2]).flatten(), ids[:, 2:-1].flatten()
    count = torch.zeros(markov.WORDS**2, markov.WORDS)
    count.index_put_((contexts, following), torch.ones(len(contexts)), accumulate=True)
    p = new.flatten(0, 1)
    expected = count.sum(1, keepdim=True) * p
    apart = ((count - expected).square() / (expected * (1 - p)))[expected > 5]
    assert float(apart.mean()) == pytest.approx(1, abs=0.1)


def test_the_arms_that_are_compared_at_equal_parameters_have_as_many() -> None:
    base = markov.LlamaForCausalLM(markov.model_config())
    assert (
        markov.trainable_parameters(base, markov.ARMS["attention"])
        == markov.trainable_parameters(base, markov.ARMS["mlp"])
        == 15360
    )
