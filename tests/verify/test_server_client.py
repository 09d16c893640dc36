"""The client of `tailora verify`: what it asks a server, and what it makes of the answers."""

import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from verified_server import MODELS, Request, StandIn, serving, stand_in

from tailora.errors import ConfigError, ServerError
from tailora.verify import server_client
from tailora.verify.passport import Probe
from tailora.verify.server_client import MOST_BYTES, ServerClient, choose_model
from tailora.verify.server_verdict import Observation

FORMS = {  # of log-probabilities in completions
    "OpenAI": {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, " b": -1.5, "c": -3}]},
    "llama-server": {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5},
                    {"token": " b", "logprob": -1.5},
                    {"token": "c", "logprob": -3},
                ],
            }
        ]
    },
}


@pytest.mark.parametrize("last", [-3, -1.8])
@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_read_in_both_forms(form: str, last: float) -> None:
    """A token that is not listed is less likely than all that are, and than all others together."""
    probe = Probe(3, ["b", "x", "a"], {}, {}, text="hello")
    choice = {"text": "a", "logprobs": json.loads(json.dumps(FORMS[form]).replace("-3", str(last)))}
    body = {"choices": [choice], "usage": {"prompt_tokens": 4}}
    with stand_in({**MODELS, "/v1/completions": (200, body)}) as url, ServerClient(url.upper()) as server:
        (answer,) = server.ask([probe], "legal")
    bound = min(last, math.log(1 - sum(map(math.exp, (-0.5, -1.5, last)))))
    assert answer == Observation(2, {2: -0.5, 0: -1.5}, pytest.approx(bound), 4, pytest.approx(math.exp(last)))


@pytest.mark.parametrize(("most", "asked"), [(20, [20, 20, 20]), (5, [20, 5, 5, 5]), (0, [20, 5, None, None, None])])
def test_a_server_is_asked_for_fewer_log_probabilities_until_it_answers(most: int, asked: list[int | None]) -> None:
    requests = list[Request]()
    probes = [Probe(3, ["a"], {}, {}, text="hello")] * 3 + [Probe(3, ["a"], {}, {}, messages=[])] * 3
    choice = {"text": "a", "message": {"content": "a"}}
    answers = dict.fromkeys(("/v1/completions", "/v1/chat/completions"), (200, {"choices": [choice]}))
    with stand_in(answers, most=most, requests=requests) as url, ServerClient(url) as server:
        assert server.ask(probes, "legal") == [Observation(0)] * 6
    for path in answers:
        assert [request.top for request in requests if request.path == path] == asked
    for request in requests:
        assert (request.body["model"], request.body["max_tokens"], request.body["temperature"]) == ("legal", 1, 0)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(server_client.asyncio, "sleep", wait)
    probe = Probe(3, ["a"], {}, {}, text="hello")
    answered = {"choices": [{"text": "a"}]}

    class Busy(StandIn):
        requests: list[Request] = []
        answers = {"/v1/completions": (200, answered)}

        def do_POST(self) -> None:
            if len(waits) == 3:
                self.reply()
                return
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Busy) as url, ServerClient(url) as server:
        assert server.ask([probe], "legal") == [Observation(0)]
    assert waits == [0.5, 1, 2]


def test_a_server_that_stays_busy_is_given_up() -> None:
    probe = Probe(3, ["a"], {}, {}, text="hello")
    busy = {"/v1/completions": (429, {"error": {"message": "try again later"}})}
    refused = pytest.raises(ServerError, match="returned 429 try again later")
    with stand_in(busy) as url, ServerClient(url, timeout=1) as server, refused:
        server.ask([probe], "legal")


def slow_headers() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    for number in range(200):
        yield b"X-Header-%d: x\r\n" % number


def slow_body() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n\r\n"
    yield from [b" "] * 200


@pytest.mark.parametrize("answer", [slow_headers, slow_body])
def test_an_answer_that_never_ends_is_given_up(answer: Callable[[], Iterator[bytes]]) -> None:
    class Slow(StandIn):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client has gone
                for part in answer():
                    self.wfile.write(part)
                    time.sleep(0.02)

    started = time.monotonic()
    does_not_end = pytest.raises(ServerError, match=r"did not answer within 0\.5 s; use a longer --timeout")
    with serving(Slow) as url, ServerClient(url, timeout=0.5) as server, does_not_end:
        server.models()
    assert time.monotonic() - started < 3


def test_a_packed_answer_is_neither_asked_for_nor_unpacked() -> None:
    asked: list[str | None] = []

    class Packed(StandIn):
        def do_GET(self) -> None:
            asked.append(self.headers["Accept-Encoding"])
            content = gzip.compress(b" " * (MOST_BYTES + 1))
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with (
        serving(Packed) as url,
        ServerClient(url) as server,
        pytest.raises(ServerError, match="is not OpenAI-compatible"),
    ):
        server.models()
    assert asked == ["identity"]


@pytest.mark.parametrize(
    "choice",
    [
        {"text": None, "message": None, "logprobs": None},
        {"text": 3, "message": [], "logprobs": []},
        {"message": {"content": None}, "logprobs": {"content": [None], "top_logprobs": [None]}},
        {"message": {"content": []}, "logprobs": {"content": [{"top_logprobs": [None, {"token": 1}]}]}},
        {"logprobs": {"content": [{"top_logprobs": 3}], "top_logprobs": [{"a": 10**400, "b": None}]}},
        {"text": "a", "logprobs": {"top_logprobs": [{"a": 0.5, "c": -3}]}},  # no log-probability is positive
        {"text": "a", "logprobs": {"top_logprobs": [{"a": 0.02}]}},
        {"text": "a", "logprobs": {"top_logprobs": [{"a": -0.1, "c": -0.2}]}},  # their probabilities are 1.7 together
        {"text": "a", "logprobs": {"top_logprobs": [{"a": -0.7, "c": -0.66}]}},  # 1.01
    ],
)
def test_nonsense_in_a_choice_is_no_observation(choice: dict[str, Any]) -> None:
    probes = [Probe(3, ["a"], {}, {}, text="hello"), Probe(3, ["a"], {}, {}, messages=[])]
    answer = (200, {"choices": [choice], "usage": []})
    with stand_in({"/v1/completions": answer, "/v1/chat/completions": answer}) as url, ServerClient(url) as server:
        assert server.ask(probes, None) == [Observation(None)] * 2


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with stand_in(MODELS) as url, ServerClient(url) as server:
        assert server.models() == {"legal": None}


def test_the_model_to_ask_is_found() -> None:
    assert choose_model({}, None, "x") is None
    assert choose_model({"base": None}, None, "x") == "base"
    assert choose_model({"base": None, "a": "base"}, None, "x") == "a"
    assert choose_model({"base": None, "a": "base", "x": "base"}, None, "x") == "x"
    assert choose_model({"x": None, "a": "x"}, None, "x") == "a"  # x is the base, not the adapter
    assert choose_model({"base": None, "a": "base"}, "a@0.5", "x") == "a@0.5"
    with pytest.raises(ConfigError, match="several models; choose one with --model: base, a, b"):
        choose_model({"base": None, "a": "base", "b": "base"}, None, "x")
    with pytest.raises(ConfigError, match="--model: unknown model 'aa'; the server has base, a; did you mean a"):
        choose_model({"base": None, "a": "base"}, "aa", "x")
