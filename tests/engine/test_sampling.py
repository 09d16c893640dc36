"""How tokens are sampled: temperature, the exact tokens that top_k and top_p keep, log-probabilities, and JSON."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
import torch.nn.functional as F
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tiny_server import CHAT, TOKENIZER, Running, running, write_adapters

from tailora.engine import sampling
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.engine.sampling import WHITESPACE, RunningRequest, allow_only, json_matcher, next_tokens
from tailora.errors import ConfigError
from tailora.serve.schemas import ChatRequest, RequestError

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


# ---- JSON: of one answer among others, with either engine

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sizes": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}
SCHEMA["properties"]["sizes"] |= {"minItems": 1, "maxItems": 2}  # type: ignore[index]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module", params=["continuous", "padded"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "WHITESPACE", " ?")  # the tiny model writes anything
        with running(write_adapters(tmp_path_factory.mktemp("adapters")), engine=request.param) as server:
            yield server


def ask(server: Running, **options: Any) -> Any:
    settings = {"model": "legal", "messages": CHAT, "max_tokens": 120, "temperature": 1.0, "response_format": FORMAT}
    return server.client.chat.completions.create(**{**settings, **options})


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["colour", "sizes"]
    assert value["colour"] in ("red", "blue")
    assert 1 <= len(value["sizes"]) <= 2
    assert all(isinstance(size, bool) for size in value["sizes"])


def test_answers_follow_their_schema_next_to_others_that_do_not(server: Running) -> None:
    free = {"response_format": {"type": "text"}, "max_tokens": 30, "seed": 4}
    expected = ask(server, **free).choices[0].message.content
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, server, seed=seed, n=3, model=("legal", "tiny")[seed % 2]) for seed in range(4)]
        texts = [pool.submit(ask, server, **free) for _ in range(2)]
        choices = [choice for answer in answers for choice in answer.result().choices]
        assert [text.result().choices[0].message.content for text in texts] == [expected] * 2
    for choice in choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    assert len({choice.message.content for choice in choices}) > 3
    assert server.app.state.server.answers == 0


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 1}, {"extra_body": {"top_k": 2}, "seed": 1}, {"top_p": 0.1, "seed": 1}]
)
def test_a_stream_and_log_probabilities_of_json(server: Running, options: dict[str, Any]) -> None:
    choice = ask(server, logprobs=True, top_logprobs=2, **options).choices[0]
    check(choice.message.content)
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert any(entry.logprob < entry.top_logprobs[-1].logprob for entry in entries)  # of the model, without the schema
    pieces = [chunk.choices[0] for chunk in ask(server, stream=True, **options)]
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[-1].finish_reason == "stop"


def test_json_ends_at_a_stop_string_at_max_tokens_and_despite_ignore_eos(server: Running) -> None:
    choice = ask(server, stop='"sizes', seed=1).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    assert "sizes" not in choice.message.content
    assert ask(server, max_tokens=3).choices[0].finish_reason == "length"
    choice = ask(server, extra_body={"ignore_eos": True}).choices[0]
    assert choice.finish_reason == "stop"
    check(choice.message.content)
    number = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}  # may go on or end
    choice = ask(server, response_format=number, max_tokens=100, extra_body={"ignore_eos": True}).choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), int)


def test_any_object(server: Running) -> None:
    for seed in range(3):
        choice = ask(server, response_format={"type": "json_object"}, seed=seed, max_tokens=60).choices[0]
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"$ref": "http://127.0.0.1/schema.json"}, "does not fetch"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_is_not_supported_is_refused(server: Running, schema: dict[str, Any], message: str) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        ask(server, response_format=response_format)
    assert raised.value.param == "response_format"


def allowed(matcher: LLMatcher) -> set[int]:
    """The head of the model has 310 rows, and the vocabulary 300 tokens."""
    return set((allow_only(torch.zeros(310), matcher) == 0).nonzero().flatten().tolist())


def test_json_may_be_compact_or_indented_but_not_padded_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHITESPACE", WHITESPACE)
    value = {"colour": "red", "sizes": [True, False]}
    tokenizer = from_tokenizer(TOKENIZER, eos_token=[2])
    texts = {
        json.dumps(value, indent=indent, separators=ends) for indent in (None, 2, 4) for ends in (None, (",", ":"))
    }
    for text in texts:
        matcher = json_matcher(SCHEMA, tokenizer)
        for token_id in TOKENIZER(text)["input_ids"]:
            assert not matcher.is_stopped()
            assert token_id in allowed(matcher)
            matcher.consume_token(token_id)
        assert matcher.is_stopped()
    matcher, newline, space = json_matcher(SCHEMA, tokenizer), *(TOKENIZER(end)["input_ids"][0] for end in "\n ")
    for token_id in (TOKENIZER("{")["input_ids"][0], newline, *[space] * 20):
        assert token_id in allowed(matcher)
        matcher.consume_token(token_id)
    assert space not in allowed(matcher)
    assert max(allowed(matcher)) < 300


def test_json_and_tools_exclude_each_other(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    core = server.app.state.server
    body = {"model": "tiny", "messages": CHAT, "response_format": {"type": "json_object"}, "tools": [tool]}
    with pytest.raises(RequestError, match="cannot be combined with tools"):
        core.grammar(ChatRequest.model_validate(body))
    assert core.grammar(ChatRequest.model_validate({**body, "tool_choice": "none"})) is not None
    assert core.grammar(ChatRequest.model_validate({**body, "response_format": {"type": "text"}})) is None


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"anyOf": [{"$ref": "#"}]}])
def test_a_schema_that_no_json_matches_is_refused(schema: dict[str, Any]) -> None:
    tokenizer = from_tokenizer(TOKENIZER, eos_token=[2])
    with pytest.raises(ConfigError, match=r"no JSON value matches the schema; check \$ref"):
        json_matcher(schema, tokenizer)
    assert allowed(json_matcher({"type": "array", "items": {"$ref": "#"}}, tokenizer))  # a list of lists, which may end


def test_a_grammar_that_fails_ends_its_own_answer_alone() -> None:
    matcher = json_matcher(SCHEMA, from_tokenizer(TOKENIZER, eos_token=[2]))
    matcher.consume_token(TOKENIZER("a")["input_ids"][0])  # as one that takes too long
    assert matcher.is_error()
    events: list[list[Token | Finish]] = [[], []]
    params = SamplingParams(1, temperature=0.0)
    requests = [Request("fails", (1,), None, params, matcher), Request("other", (1,), None, params)]
    running = [RunningRequest(request, own.append) for request, own in zip(requests, events, strict=True)]
    next_tokens(F.pad(LOGITS, (0, 300)).repeat(2, 1), running, ())
    assert [type(event) for event in events[0]] == [Finish]
    assert events[0][0] == Finish("error", matcher.get_error())
    assert events[1][-1] == Finish("length")
