"""What clients may send: faults are told in a few words, sizes and times are limited, and no request is an error."""

import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_server import CHAT, TOKENIZER, Running, chat, held_forwards, running, write_adapters

import tailora.serve.schemas

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(write_adapters(tmp_path_factory.mktemp("adapters"))) as server:
        yield server


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 1000}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"lora_scal": 1}}, "lora_scal"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": "word " * 400}, "prompt"),
        ({"prompt": [len(TOKENIZER)]}, "prompt"),
        ({"prompt": "a\ud800b"}, "prompt"),
        ({"prompt": ["a", "a\ud800b"]}, "prompt"),
        ({"messages": [{"role": "user", "content": "a\ud800b"}]}, "messages"),
        ({"stop": ["\ud800"]}, "stop"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(server: Running, options: dict[str, Any], param: str) -> None:
    path = "completions" if "prompt" in options else "chat/completions"
    body = {"model": "legal", **({} if "prompt" in options else {"messages": CHAT}), **options}
    response = server.http.post(f"/v1/{path}", content=json.dumps(body | body.pop("extra_body", {})), headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "name", "value", "accepted"),
    [
        ("completions", "frequency_penalty", 0.5, "0"),
        ("completions", "logit_bias", {"5": 1}, "{}"),
        ("completions", "echo", True, "false"),
        ("completions", "best_of", 2, "1"),
        ("chat/completions", "tool_choice", "required", '"auto" or "none"'),
    ],
)
def test_what_is_not_supported_is_called_so(server: Running, path: str, name: str, value: Any, accepted: str) -> None:
    prompt: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "what"}
    response = server.http.post(f"/v1/{path}", json={"model": "legal", **prompt, name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == f"{name}: value not supported; remove it, or use {accepted}"
    assert error["param"] == name
    neutral = {"0": 0, "{}": {}, "false": False, "1": 1}.get(accepted)
    for taken in (None, neutral):
        request = {"model": "legal", **prompt, "max_tokens": 1, name: taken}
        assert server.http.post(f"/v1/{path}", json=request).status_code == 200


def many(unit: str, count: int = 20_000) -> str:
    return f"[{', '.join([unit] * count)}]"


FIELDS = ", ".join(f'"field{i}": 1' for i in range(20_000))
INVALID = {  # small bodies with many faults: reporting each took seconds, in which no other request was answered
    "messages": f'"messages": {many("{}")}',
    "parts": f'"messages": [{{"role": "user", "content": {many("{}")}}}]',
    "calls": f'"messages": [{{"role": "assistant", "tool_calls": {many("1")}}}]',
    "fields": f'"messages": [], {FIELDS}',
    "tool fields": f'"messages": [{{"role": "user", "content": ""}}], "tools": [{{{FIELDS}}}]',
    "prompts": f'"prompt": {many("[]")}',
    "objects": f'"prompt": {many("{}")}',
    "prompts of objects": f'"prompt": [{many("{}")}]',
    "stop": f'"prompt": "a", "stop": {many("1")}',
    "name": f'"prompt": "a", "{"x" * 100_000}": 1',
}


@pytest.mark.parametrize("fault", INVALID)
def test_many_faults_are_not_all_reported(server: Running, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[int] = []
    original = tailora.serve.schemas.describe
    monkeypatch.setattr("tailora.serve.schemas.describe", lambda found: described.append(len(found)) or original(found))
    path = "completions" if '"prompt"' in INVALID[fault] else "chat/completions"
    response = server.http.post(f"/v1/{path}", content=f'{{"model": "tiny", {INVALID[fault]}}}', headers=JSON)
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert described[0] <= 11


def test_ten_faults_are_reported(server: Running) -> None:
    body = {"model": "tiny", "prompt": "a", **{f"field{i}": 1 for i in range(12)}}
    message = server.http.post("/v1/completions", json=body).json()["error"]["message"]
    assert message.count("Extra inputs") == 10
    assert message.endswith("; and more")


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(server: Running, kind: str) -> None:
    core = server.app.state.server
    assert core.longest_text == 200 * max(map(len, TOKENIZER.get_vocab()))
    text = "a" * (core.longest_text + 1)
    ask = partial(chat, server, messages=[{"role": "user", "content": text}])
    if kind == "completion":
        ask = partial(server.client.completions.create, prompt=["a", text])
    with pytest.raises(openai.BadRequestError, match="characters, but at most") as raised:
        ask(model="legal")
    assert raised.value.param == ("messages" if kind == "chat" else "prompt")


def test_clients_that_do_not_finish_their_request_are_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.serve.app.REQUEST_SECONDS", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    clients = []
    for sent in (b"", b"POST", head, head + b"\r\n", head + b'\r\n{"model"', whole + b"GET /he"):
        clients.append(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5))
        clients[-1].sendall(sent)
    with held_forwards(server) as forwards:  # a slow answer is not the client's fault
        slow = chat(server, "legal", stream=True)
        for client in clients:
            with client:
                while client.recv(4096):  # until the server closes
                    pass
        time.sleep(1)
        forwards.go_on.set()
        assert [chunk.choices[0].finish_reason for chunk in slow][-1] == "length"
    assert chat(server, "legal", max_tokens=1).choices


def test_the_longest_answer_is_that_of_the_settings(tmp_path: Path) -> None:
    with running(write_adapters(tmp_path), max_tokens=5) as server:
        with pytest.raises(openai.BadRequestError, match=r"max_tokens = 6 is too large .* use at most 5"):
            chat(server, "legal", max_tokens=6)
        answers = [chat(server, "legal", max_tokens=longest) for longest in (5, None)]
        assert [answer.usage.completion_tokens for answer in answers] == [5, 5]


def test_a_picture_is_refused_in_one_sentence(server: Running) -> None:
    parts = [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError) as raised:
        chat(server, "legal", messages=[{"role": "user", "content": parts}])
    assert raised.value.body["message"] == (  # type: ignore[index]
        "this model cannot answer questions about images: it reads only text; remove the images"
    )
    halves = [{"type": "text", "text": "what is"}, {"type": "text", "text": " that"}]
    answers = {
        chat(server, "legal", messages=[{"role": "user", "content": content}]).choices[0].message.content
        for content in (halves, "what is that")
    }
    assert len(answers) == 1


def test_an_unknown_route_names_those_that_there_are(server: Running) -> None:
    response = server.http.get("/v1/embeddings")
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert message.startswith(
        "unknown route GET /v1/embeddings; available: POST /v1/chat/completions, POST /v1/completions, GET "
    )
    response = server.http.get("/v1/completions")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert "POST /v1/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize("has_length", [True, False])
def test_a_body_that_is_too_large_is_refused(
    server: Running, has_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.serve.app.LARGEST_BODY", 10_000)
    body = json.dumps({"model": "legal", "prompt": "x" * 20_000}).encode()
    content = body if has_length else iter([body[:5_000], body[5_000:]])
    response = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the request is too large; the limit is 10,000 bytes"
    assert chat(server, "legal").choices


# ---- Random requests

texts = st.text(st.characters(exclude_categories=()), max_size=4)  # with halves of surrogate pairs
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
numbers = st.sampled_from([0, 0.5, 1, 1e-310, 2, -1, 1e308])
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "nobody"])
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": texts}), max_size=2)
messages = st.fixed_dictionaries(
    {"role": roles, "content": texts | parts | anything}, optional={"tool_calls": anything}
)
schemas = st.sampled_from([{"type": "boolean"}, {"enum": ["a", 1]}, {"type": "nothing"}, {}])
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "xml"])},
    optional={"json_schema": st.fixed_dictionaries({"name": st.just("a"), "schema": schemas | anything})},
)
FIELDS_OF_BOTH = {
    "max_tokens": st.sampled_from([1, 3]),
    "temperature": numbers,
    "top_p": numbers,
    "top_k": st.integers(-2, 5),
    "n": st.integers(0, 3),
    "seed": st.integers(-(2**63) - 1, 2**63),
    "stop": texts | st.lists(texts, max_size=3),
    "stream": st.booleans(),
    "lora_scale": numbers,
    "ignore_eos": st.booleans(),
}
FIELDS_OF = {
    "chat/completions": {
        "messages": st.lists(messages, max_size=3) | st.just(CHAT),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 3),
        "response_format": formats,
        "tools": st.just([]) | anything,
    },
    "completions": {
        "prompt": texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 310), max_size=4) | anything,
        "logprobs": st.integers(-1, 3),
        "echo": st.booleans(),
    },
}


@st.composite
def requests_of_clients(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Mostly valid requests: a few fields, one of them sometimes with anything in it, and rarely an unknown one."""
    path = draw(st.sampled_from(sorted(FIELDS_OF)))
    needed = "messages" if path == "chat/completions" else "prompt"
    fields = {**FIELDS_OF_BOTH, **FIELDS_OF[path]}
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True))
    body = {name: draw(fields[name]) for name in dict.fromkeys([needed, "max_tokens", *names])}
    body["model"] = draw(st.sampled_from(["legal", "tiny", "legal@0.5", "legal@1e38", "legal@much", "nobody", ""]))
    if draw(st.integers(0, 4)) == 0:
        body[draw(st.sampled_from(sorted(fields)) | texts)] = draw(anything)
    return path, body


@settings(max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(request=requests_of_clients())
def test_any_request_is_answered_or_refused_with_a_reason(server: Running, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    response = server.http.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    documented = server.app.openapi()["paths"][f"/v1/{path}"]["post"]["responses"]
    assert str(response.status_code) in documented
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 5 < len(error["message"]) < 3000
    elif body.get("stream"):
        *events, end = [line for line in response.text.split("\n\n") if line]
        assert end == "data: [DONE]"
        reasons = [json.loads(event.removeprefix("data: "))["choices"][0]["finish_reason"] for event in events]
        assert len(list(filter(None, reasons))) == (body.get("n") or 1) * prompts_in(body)
    else:
        answer = response.json()
        assert [choice["index"] for choice in answer["choices"]] == list(range((body.get("n") or 1) * prompts_in(body)))
        assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
        longest = body["max_tokens"] or answer["usage"]["completion_tokens"]
        assert answer["usage"]["completion_tokens"] <= longest * len(answer["choices"])


def prompts_in(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
