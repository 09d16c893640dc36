"""The server: what clients of OpenAI's API and of vLLM's adapter calls get from a real one on loopback."""

import asyncio
import copy
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tiny import CHATML
from tiny_server import CHAT, TOKENIZER, Running, base_model, chat, held_forwards, running, write_adapters

from benchmarks.serving.server_process import SECONDS_TO_START, free_port
from tailora import LoRAModel
from tailora.cli.main import main
from tailora.cli.serve import adapters_in, address, listen, report_systems
from tailora.data.chat_template import ChatTokenizer
from tailora.errors import AdapterNotFoundError
from tailora.formats.run_folder import write_system_message
from tailora.serve.app import EventStream
from tailora.serve.schemas import ChatRequest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(root) as server:
        yield server


def write_of_task(root: Path, name: str, task_type: str) -> None:
    """Writes an adapter whose settings say this task into the folder."""
    shutil.copytree(root / "legal", root / name)
    config = root / name / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": task_type}))


def test_an_adapter_answers_under_its_name_and_the_base_under_its_own(server: Running, root: Path) -> None:
    base, legal = (chat(server, model).choices[0].message.content for model in ("tiny", "legal"))
    assert base != legal
    model = LoRAModel.from_pretrained(base_model(), root / "legal")
    ids = TOKENIZER(TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))["input_ids"]
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert legal == TOKENIZER.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert chat(server, "legal", extra_body={"ignore_eos": True, "lora_scale": 0.0}).choices[0].message.content == base
    assert chat(server, "legal@0").choices[0].message.content == base


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_has_what_the_whole_answer_has(server: Running, kind: str) -> None:
    def entries(choice: Any) -> list[Any]:
        return getattr(choice.logprobs, "content" if kind == "chat" else "top_logprobs", None) or []

    options = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "n": 2, "extra_body": {"ignore_eos": True}}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    options |= {"logprobs": True, "top_logprobs": 2} if kind == "chat" else {"logprobs": 2}
    ask = partial(chat, server) if kind == "chat" else partial(server.client.completions.create, prompt="the cat")
    whole, chunks = ask(model="legal", **options), list(ask(model="legal", **options, **usage))
    expected = [choice.message.content if kind == "chat" else choice.text for choice in whole.choices]
    texts, logprobs = ["", ""], [list[Any](), list[Any]()]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += (choice.delta.content or "") if kind == "chat" else choice.text
        logprobs[choice.index] += entries(choice)
    assert texts == expected
    assert logprobs == [entries(choice) for choice in whole.choices]
    assert texts[0] != texts[1]
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 40


def test_a_stop_string_ends_the_answer_before_it(server: Running) -> None:
    text = chat(server, "legal", max_tokens=40).choices[0].message.content
    stop = text[5:8]
    choice = chat(server, "legal", max_tokens=40, stop=[stop]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    pieces = chat(server, "legal", max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == text[: text.index(stop)]


def test_logprobs_of_both_kinds_agree(server: Running) -> None:
    prompt = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    entries = chat(server, "legal", max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    completion = server.client.completions.create(model="legal", prompt=prompt, max_tokens=3, temperature=0, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert [entry.logprob for entry in entries] == pytest.approx(logprobs.token_logprobs)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert entries[0].top_logprobs[0].logprob == entries[0].logprob  # greedy


def test_adapters_are_loaded_and_unloaded(server: Running, root: Path) -> None:
    def post(path: str, **body: Any) -> tuple[int, Any]:
        response = server.http.post(f"/v1/{path}", json=body)
        is_json = response.headers["content-type"].startswith("application/json")
        return response.status_code, response.json()["error"] if is_json else response.text

    answer = (200, "Success: LoRA adapter 'rhyme' added successfully.")
    assert post("load_lora_adapter", lora_name="rhyme", lora_path="poet") == answer
    assert {model.id for model in server.client.models.list()} == {"tiny", "legal", "rhyme"}
    assert chat(server, "rhyme@0.5").choices[0].message.content
    status, error = post("load_lora_adapter", lora_name="rhyme", lora_path="poet")
    assert (status, error["type"]) == (400, "InvalidUserInput")
    for path, expected in (("nowhere", 404), ("../..", 400), ("empty", 400), (".", 400)):
        (root / "empty").mkdir(exist_ok=True)
        status, error = post("load_lora_adapter", lora_name="x", lora_path=path)
        assert status == expected
        assert str(root) not in error["message"]
    chat(server, "rhyme")
    assert any('model="rhyme"' in name for name in metrics(server))
    assert post("unload_lora_adapter", lora_name="rhyme")[0] == 200
    assert not any('model="rhyme"' in name for name in metrics(server))  # names that come and go would fill the memory
    status, error = post("unload_lora_adapter", lora_name="rhyme")
    assert (status, error["type"]) == (404, "NotFoundError")
    with pytest.raises(openai.NotFoundError) as raised:
        chat(server, "rhyme")
    assert raised.value.param == "model"


def test_an_adapter_for_labels_is_not_loaded(server: Running, root: Path) -> None:
    write_of_task(root, "tickets", "SEQ_CLS")
    try:
        response = server.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "tickets"})
    finally:
        shutil.rmtree(root / "tickets")
    assert response.status_code == 400
    start = "tickets was trained for sequence-classification: it predicts labels and cannot generate text; "
    assert response.json()["error"]["message"].startswith(start)


def test_requests_without_a_system_message_get_that_of_the_training(root: Path) -> None:
    """An empty one leaves it out."""
    for name, system in (("legal", "good morning"), ("poet", "a dog ran")):
        write_system_message(root / name, system)
    try:
        with running(root, adapters=["legal", "poet"], base_system="the cat") as server:
            prompt = server.app.state.server.chat_prompt
            systems = {model.id: model.system_message for model in server.client.models.list()}  # type: ignore[attr-defined]

            def rendered(model: str, *messages: dict[str, str]) -> str:
                body = ChatRequest.model_validate({"model": model, "messages": [*messages, *CHAT]})
                return str(prompt(body)[0])

            without = rendered("legal", {"role": "system", "content": ""})
            with_system = {model: rendered(model) for model in ("tiny", "legal", "legal@0.5", "legal@0")}
            assert (
                rendered("legal", {"role": "system", "content": "away"})
                == f"<|im_start|>system\naway<|im_end|>\n{without}"
            )
            late = [*CHAT, {"role": "system", "content": "away"}]
            body = ChatRequest.model_validate({"model": "legal", "messages": late})
            assert prompt(body)[0] == TOKENIZER.apply_chat_template(late, tokenize=False, add_generation_prompt=True)
            with pytest.raises(AdapterNotFoundError):
                rendered("nobody")
    finally:
        for name in ("legal", "poet"):
            write_system_message(root / name, None)
    assert "system" not in without
    assert systems == {"tiny": "the cat", "legal": "good morning", "poet": "a dog ran"}
    expected = {"tiny": "the cat", "legal": "good morning", "legal@0.5": "good morning", "legal@0": "the cat"}
    for model, system in expected.items():
        assert with_system[model] == f"<|im_start|>system\n{system}<|im_end|>\n{without}"


def test_the_command_says_which_models_have_a_system_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("with", 3), ("without", 0)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"data": {"messages": {"system": count}}}))
    systems = {"base": None, "stored": "good morning", "with": None, "without": None}
    folders = {name: tmp_path / name for name in ("stored", "with", "without")}
    report_systems(systems, folders)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines == [
        "note: requests to stored without a system message use the one from training",
        "note: the training examples of with have different system messages; send one with each request",
    ]


def test_an_interrupt_waits_for_answers_and_a_second_one_ends_them(root: Path) -> None:
    with running(root, drain_seconds=60) as server, held_forwards(server) as forwards:
        events = server.app.state.http, server.app.state.notes
        stream = chat(server, "legal", stream=True, max_tokens=150)
        assert forwards.is_held.wait(60)
        began = time.monotonic()
        events[0].handle_exit(signal.SIGINT, None)
        while not events[1]:
            assert time.monotonic() < began + 30
            time.sleep(0.01)
        assert events[1] == ["shutting down: waiting up to 60 s for 1 completion; press Ctrl-C again to stop now"]
        events[0].handle_exit(signal.SIGINT, None)
        events[0]._captured_signals.clear()
        forwards.go_on.set()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        assert time.monotonic() - began < 30


def metrics(server: Running) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in server.http.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server: Running, stream: bool) -> None:
    core = server.app.state.server
    body = {"model": "legal", "messages": CHAT, "max_tokens": 170, "ignore_eos": True, "n": 8, "stream": stream}
    with held_forwards(server) as forwards:
        with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if stream:
                assert connection.getresponse().readline()
            assert forwards.is_held.wait(60)
            assert core.answers == 8
        deadline = time.monotonic() + 10
        while core.answers and time.monotonic() < deadline:
            time.sleep(0.01)
        assert core.answers == 0
        forwards.go_on.set()
        assert chat(server, "legal", max_tokens=1).choices  # the 8 had all places
        assert forwards.count < 20


@pytest.mark.parametrize(("last", "expected"), [("start", ["answers", 499]), ("body", ["answers", "events", 499])])
def test_a_stream_is_cancelled_wherever_its_client_goes_away(last: str, expected: list[str | int]) -> None:
    """And counted in the metrics as a client that went away."""
    ended: list[str | int] = []

    async def events() -> AsyncGenerator[dict[str, Any]]:
        try:
            while True:
                yield {"status": "ok"}
        finally:
            ended.append("events")

    async def respond() -> None:
        is_gone = asyncio.Event()

        async def receive() -> dict[str, str]:
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == f"http.response.{last}":
                is_gone.set()
                await asyncio.Event().wait()  # as a connection that takes no more

        response = EventStream(events(), lambda: ended.append("answers"), ended.append)
        await response({"type": "http"}, receive, send)
        assert ended == expected

    asyncio.run(respond())


def test_a_forward_that_fails_is_an_error_of_its_requests_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise RuntimeError("a kernel failed")

    with running(root) as server:
        layer = server.app.state.server.engine.adapter_set.base_model.get_submodule("model.layers.0.mlp")
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", forward)
            with pytest.raises(openai.InternalServerError, match="a kernel failed"):
                chat(server, "legal")
            body = {"model": "legal", "messages": CHAT, "max_tokens": 4, "stream": True}
            events = list(server.http.post("/v1/chat/completions", json=body).iter_lines())
            assert "a kernel failed" in events[-4]
            assert metrics(server)['tailora_requests_total{model="legal",status="500"}'] == 2  # whole and streamed
        assert server.http.get("/ready").status_code == 200
        assert chat(server, "legal").choices[0].message.content


def test_a_full_queue_refuses(root: Path) -> None:
    with running(root, max_queue=2) as server:
        with pytest.raises(openai.BadRequestError, match="the limit is 2"):  # waiting would not help
            chat(server, "legal", n=3)
        with held_forwards(server) as forwards:
            long = chat(server, "legal", stream=True)
            assert forwards.is_held.wait(60)
            with pytest.raises(openai.RateLimitError) as raised:
                chat(server, "legal", n=2)
        assert raised.value.response.headers["Retry-After"] == "1"
        list(long)
        with pytest.raises(openai.NotFoundError):
            server.client.completions.create(model="unknown", prompt="a", n=2)
        assert server.app.state.server.answers == 0
        assert len(chat(server, "legal", n=2).choices) == 2
        assert server.app.state.server.answers == 0


def test_pages_of_other_sites_cannot_reach_a_local_server(root: Path) -> None:
    with running(root, allowed_hosts=("127.0.0.1",)) as server:
        assert server.http.get("/v1/models").status_code == 200
        assert server.http.get("/v1/models", headers={"Host": "attacker.example"}).status_code == 400


def test_keys_are_required_and_described(root: Path, server: Running) -> None:
    with running(root, api_key="user-key", admin_key="admin-key") as keyed:
        assert chat(keyed, "legal").choices
        assert keyed.http.get("/v1/models").status_code == 401
        assert keyed.http.get("/health").status_code == 200
        for key, status in (("user-key", 401), ("admin-key", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            answer = keyed.http.post("/v1/unload_lora_adapter", json={"lora_name": "legal"}, headers=headers)
            assert answer.status_code == status
        description = keyed.http.get("/openapi.json").json()
    bearer = {"type": "http", "scheme": "bearer"}
    assert description["components"]["securitySchemes"] == {"apiKey": bearer, "adminKey": bearer}
    operations = {path: next(iter(methods.values())) for path, methods in description["paths"].items()}
    keys = {path: "".join(*operation.get("security", [{}])) for path, operation in operations.items()}
    assert keys == {
        **dict.fromkeys(["/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"], "apiKey"),
        **dict.fromkeys(["/v1/load_lora_adapter", "/v1/unload_lora_adapter"], "adminKey"),
        **dict.fromkeys(["/health", "/ready"], ""),
    }
    assert "security" not in server.http.get("/openapi.json").text
    with running(root, api_key="user-key") as keyed:  # also for loading, if that has no key of its own
        for headers, status in ((None, 401), ({"Authorization": "Bearer user-key"}, 200)):
            answer = keyed.http.post("/v1/unload_lora_adapter", json={"lora_name": "legal"}, headers=headers)
            assert answer.status_code == status


@pytest.mark.parametrize("variable", ["TAILORA_API_KEY", "TAILORA_ADMIN_KEY"])
def test_an_empty_key_is_an_error_of_the_command(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, " ")
    assert main(["serve", "--model", "nowhere"]) == 2
    assert f"{variable} is empty; set it to a key" in capsys.readouterr().err


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = CHATML.replace("{% for", "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for", 1).replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message.tool_calls %}{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}{% endfor %}",
)


def called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "18"},
    ]


def test_a_template_without_tools_gets_them_as_text_as_in_training(server: Running) -> None:
    def prompt(**body: Any) -> str:
        request = ChatRequest.model_validate({"model": "legal", "messages": called("{}"), **body})
        return server.app.state.server.chat_prompt(request)[0]

    assert '"name": "weather"' in prompt(tools=[TOOL]).partition("<|im_end|>")[0]
    assert '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>' in prompt()
    assert "<tools>" not in prompt(tools=[TOOL], tool_choice="none")
    assert chat(server, "legal", messages=called("{}")).choices


def test_tools_that_the_template_writes_in_no_form_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(server.app.state.server, "chat_tokenizer", ChatTokenizer.of(tokenizer))
    with pytest.raises(openai.BadRequestError, match="does not render tool 0") as raised:
        chat(server, "legal", tools=[TOOL])
    assert raised.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="does not render tool call 0 of message 1") as raised:
        chat(server, "legal", messages=called("{}"))
    assert raised.value.param == "messages"


def test_a_template_gets_the_arguments_of_calls_as_an_object(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.chat_template = WITH_TOOLS
    monkeypatch.setattr(server.app.state.server, "chat_tokenizer", ChatTokenizer.of(tokenizer))
    body = {"model": "legal", "messages": called('{"city": "Rome"}'), "tools": [TOOL]}
    prompt, *_ = server.app.state.server.chat_prompt(ChatRequest.model_validate(body))
    assert "weather city=Rome<|im_end|>" in prompt
    assert prompt.startswith('{"type": "function", "function": {"name": "weather"')
    assert chat(server, "legal", messages=called('{"city": "Rome"}'), tools=[TOOL]).choices
    with pytest.raises(openai.BadRequestError, match="expected JSON text") as raised:
        chat(server, "legal", messages=called("Rome"), tools=[TOOL])
    assert raised.value.param == "messages"


def test_metrics_count(server: Running) -> None:
    counted = (
        'tailora_requests_total{model="legal",status="200"}',
        'tailora_generation_tokens_total{model="legal"}',
        'tailora_time_to_first_token_seconds_count{model="legal"}',
        'tailora_time_to_first_token_seconds_count{model="tiny"}',
    )

    def values() -> Counter[str]:
        return Counter({name: value for name, value in metrics(server).items() if name in counted})

    before = values()
    chat(server, "legal", max_tokens=12)
    assert [(values() - before)[name] for name in counted[:2]] == [1, 12]
    list(chat(server, "legal", stream=True))
    assert [(values() - before)[name] for name in counted] == [2, 24, 2, 0]
    chat(server, "legal@0.25")
    assert (values() - before)[counted[0]] == 3
    assert not any("@" in name for name in metrics(server))  # clients can invent any number of scales


@pytest.mark.slow
def test_the_command_serves_a_folder_and_ends_with_sigterm(root: Path, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    folder = shutil.copytree(root, tmp_path / "outputs")
    write_of_task(folder, "tickets", "SEQ_CLS")
    write_of_task(folder, "t5", "SEQ_2_SEQ_LM")
    port = free_port()
    arguments = ["--model", str(tmp_path / "base"), "--name", "tiny", "--adapters", str(folder), "--port", str(port)]
    command = [sys.executable, "-m", "tailora.cli", "serve", *arguments, "--device", "cpu"]
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    end = time.monotonic() + SECONDS_TO_START
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:
                try:
                    client.get("/ready").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.1)
            assert {model["id"] for model in client.get("/v1/models").json()["data"]} == {"tiny", "legal", "poet"}
            body = {"model": "poet", "messages": CHAT, "max_tokens": 150, "ignore_eos": True}
            unfinished = socket.create_connection(("127.0.0.1", port))
            unfinished.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
            streaming = client.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
            with unfinished, streaming as response:
                lines = response.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                assert [first, *lines][-2:] == ["data: [DONE]", ""]  # the answer ends before the server does
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    told = log.read_text()
    assert "engine: continuous batching" in told
    assert "models: tiny, legal, poet\n" in told
    assert (
        "skipped adapters, because they predict labels instead of generating text: tickets (sequence-classification)"
        in told
    )
    assert "t5 (seq2seq)" in told
    assert "what is that" not in told
    assert told.count("shutting down: waiting up to 30 s for 1 completion") == 1
    assert "Traceback" not in told


def test_a_folder_of_adapters_may_hold_runs(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "legal", tmp_path / "run" / "adapter")
    shutil.copytree(root / "poet", tmp_path / "poet")
    (tmp_path / "notes").mkdir()
    assert adapters_in(tmp_path) == {"poet": tmp_path / "poet", "run": tmp_path / "run"}


def test_no_answer_waits_for_the_clients_acknowledgement() -> None:
    """With Nagle's algorithm every answer after the first on a connection comes 40 ms later."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]")]
)
def test_the_address_that_is_printed_works(host: str, expected: str) -> None:
    with listen(host, 0) as listener:
        shown = address(host, listener)
        assert shown == f"http://{expected}:{listener.getsockname()[1]}"
        with socket.create_connection((str(httpx.URL(shown).host), httpx.URL(shown).port or 0)):
            pass


def test_a_port_in_use_is_an_error_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
        assert main(["playground", "--url", "http://127.0.0.1:1", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told.count(f"port {port}") == 2
    assert "Traceback" not in told
