"""How tokens are sampled: temperature, exactly the tokens that top_k and top_p keep, and log-probabilities."""

import pytest
import torch

from tailora.serve import sampling
from tailora.serve.engine_interface import Finish, Request, SamplingParams, Token
from tailora.serve.sampling import RunningRequest, next_tokens

PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]  # by likelihood: 1, 3, 4, 2, 0
LOGITS = torch.tensor(PROBABILITIES).log()[None] + 3


def sampled(draws: int = 400, **settings: object) -> list[Token]:
    tokens: list[Token] = []

    def handle(event: Token | Finish) -> None:
        if isinstance(event, Token):
            tokens.append(event)

    params = SamplingParams(**{"max_tokens": draws, "seed": 1, **settings})  # type: ignore[arg-type]
    running = RunningRequest(Request("x", (1,), None, params), handle)
    for _ in range(draws):
        assert next_tokens(LOGITS, [running], ()) == [tokens[-1].id]
    return tokens


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-30])
def test_a_tiny_temperature_chooses_the_likeliest_token(temperature: float) -> None:
    assert {token.id for token in sampled(20, temperature=temperature)} == {1}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.399}, {1}),  # the likeliest ones up to the first that reaches the sum
        ({"top_p": 0.401}, {1, 3}),
        ({"top_p": 0.649}, {1, 3}),
        ({"top_p": 0.651}, {1, 3, 4}),
        ({"top_p": 0.949}, {1, 3, 4, 2}),
        ({"top_p": 0.951}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 2, "top_p": 0.614}, {1}),  # a share of what top_k leaves: .4 of .65 is .615
        ({"top_k": 2, "top_p": 0.617}, {1, 3}),
        ({"top_k": 3, "top_p": 0.763}, {1, 3}),
        ({"top_k": 3, "top_p": 0.767}, {1, 3, 4}),
        ({"top_p": 0.7, "temperature": 0.5}, {1, 3}),  # of the distribution after the temperature
        ({"top_p": 0.58, "temperature": 0.5}, {1}),
    ],
)
@pytest.mark.parametrize("likeliest", [1024, 2])  # tokens that are sorted first; more if these do not reach top_p
def test_top_k_and_top_p_keep_exactly_these_tokens(
    settings: dict[str, float], kept: set[int], likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    assert {token.id for token in sampled(**settings)} == kept


def test_tokens_are_as_frequent_as_the_temperature_says() -> None:
    weights = torch.tensor(PROBABILITIES).double() ** (1 / 1.7)
    expected = weights / weights.sum()
    counts = torch.bincount(torch.tensor([token.id for token in sampled(4000, temperature=1.7)]), minlength=5)
    standard_error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("settings", [{"temperature": 0.3}, {"temperature": 1.9}, {"top_k": 2}, {"top_p": 0.5}])
def test_log_probabilities_are_those_before_temperature_top_k_and_top_p(settings: dict[str, float]) -> None:
    expected = torch.tensor(PROBABILITIES).log()
    for token in sampled(20, logprobs=5, **settings):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        assert [number for number, _ in token.top] == [1, 3, 4, 2, 0]
        assert [logprob for _, logprob in token.top] == pytest.approx(
            expected.sort(descending=True)[0].tolist(), abs=1e-5
        )


def test_a_token_that_cannot_come_has_a_logprob_that_json_can_write() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    tokens: list[Token | Finish] = []
    running = RunningRequest(Request("x", (1,), None, SamplingParams(1, 0.0, logprobs=3)), tokens.append)
    next_tokens(logits, [running], ())
    assert tokens[0].top[-1] == (1, sampling.LOWEST_LOGPROB)  # type: ignore[union-attr]
