"""The page for comparing two models: its headers, how its requests are passed on, and what people do in a browser."""

import asyncio
import base64
import itertools
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from playwright.sync_api import Browser, Page, expect
from tiny_server import on_loopback, running, write_adapters
from tiny_vision import save_image

from tailora.data.readers import Row
from tailora.data.schemas import PREFERENCE, detect_schema
from tailora.errors import ConfigError
from tailora.serve.playground import LOCAL_HOSTS, add_page, page, page_headers, playground_app

TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]
ANSWERS = {"base": ["I", " am", " here"], "legal": ["I", " object", " <b>strongly</b>"]}


def upstream(
    requests: list[dict[str, Any]],
    owner: str = "tailora",
    system: str | None = None,
    modalities: list[str] | None = None,
) -> FastAPI:
    """A server of OpenAI's API with a base and adapters; it notes the requests.

    owner: of the models.    system: message that the adapters were trained with.    modalities: that they read.
    """
    app = FastAPI()
    names = ["base", "legal"]
    more = {} if modalities is None else {"input_modalities": modalities}

    @app.get("/v1/models")
    async def models() -> Any:
        return {
            "object": "list",
            "data": [
                {"id": "base", "parent": None, "owned_by": owner, "system_message": None, **more},
                *(
                    {"id": name, "parent": "base", "owned_by": owner, "system_message": system, **more}
                    for name in names[1:]
                ),
            ],
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        requests.append({**body, "authorization": request.headers.get("authorization")})
        if body["messages"][-1]["content"] == "fail":
            return JSONResponse({"error": {"message": "the queue is full", "code": 429}}, 429)
        return StreamingResponse(events(body), media_type="text/event-stream")

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        body = await request.json()
        requests.append({**body, "authorization": request.headers.get("authorization")})
        if body["lora_path"] == "missing":
            return JSONResponse({"error": {"message": "missing does not exist"}}, 404)
        names.append(body["lora_name"])
        return PlainTextResponse("Success")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        names.remove((await request.json())["lora_name"])
        return PlainTextResponse("Success")

    return app


async def events(body: dict[str, Any]) -> AsyncIterator[str]:
    def event(delta: dict[str, Any], **others: Any) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, **others}]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    prompt, own_tokens = body["messages"][-1]["content"], ANSWERS[body["model"]]
    if prompt == "parts":
        part = {"token": "\ufffd", "logprob": -0.5, "bytes": None, "top_logprobs": []}
        yield event({"content": ""}, logprobs={"content": [part]})
        yield event({"content": own_tokens[0]}, logprobs={"content": [part]})
        own_tokens = own_tokens[1:]
    for number, token in enumerate(own_tokens):
        if prompt == "endless" and number:
            await asyncio.Event().wait()  # until the client goes away
        own = {"token": token, "logprob": -0.5, "bytes": None}
        top = [{"token": tokens[1], "logprob": -2.5, "bytes": None} for tokens in ANSWERS.values()]
        yield event({"content": token}, logprobs={"content": [{**own, "top_logprobs": top}]})
    end = {"token": "<|im_end|>", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    yield event({"content": ""}, logprobs={"content": [end]})  # a token without text in the answer
    yield event({}, finish_reason="stop")
    yield "data: [DONE]\n\n"


@pytest.fixture
def requests() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def url(requests: list[dict[str, Any]]) -> Iterator[str]:
    with on_loopback(upstream(requests)) as server, on_loopback(playground_app(f"{server}/v1")) as address:
        yield address


# ---- Headers, and requests passed on


def test_the_policy_allows_the_pages_own_script_and_style_alone() -> None:
    policy = page_headers(page())["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert "default-src 'none'" in policy
    changed = page_headers(page().replace("use strict", "use  strict"))["Content-Security-Policy"]
    assert changed != policy


def test_the_page_needs_nothing_from_outside() -> None:
    html = page()
    assert "http://" not in html
    assert "https://" not in html
    assert "innerHTML" not in html  # answers are text


def test_our_own_server_has_the_page_at_its_root() -> None:
    app = FastAPI()
    add_page(app)
    with on_loopback(app) as address:
        answer = httpx.get(address)
    assert answer.text == page()
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_requests_are_passed_on_as_they_are(url: str, requests: list[dict[str, Any]]) -> None:
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["base", "legal"]
    body = {"model": "legal", "messages": [{"role": "user", "content": "fail"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer k"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (429, "the queue is full")
    assert requests == [{**body, "authorization": "Bearer k"}]
    assert httpx.get(f"{url}/v1/files").status_code == 404


def test_other_sites_cannot_use_it(url: str, requests: list[dict[str, Any]]) -> None:
    path = f"{url}/v1/load_lora_adapter"
    plain = httpx.post(path, content='{"lora_name": "x", "lora_path": "y"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
    preflight = httpx.options(path, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers
    assert requests == []


def test_a_server_that_cannot_be_reached_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with on_loopback(playground_app(f"http://127.0.0.1:{port}")) as address:
        answer = httpx.get(f"{address}/v1/models")
    assert answer.status_code == 502
    assert "cannot reach http://127.0.0.1" in answer.json()["error"]["message"]


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://x", "http://", "", "http://[::1", "http://x:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected a server address"):
        playground_app(address)


# ---- In a browser


@contextmanager
def open_page(browser: Browser, url: str) -> Iterator[Page]:
    """The page with its models listed; fails on messages of the browser and requests to other servers."""
    shown = browser.new_page()
    messages: list[str] = []
    shown.on("console", lambda message: messages.append(message.text))
    shown.on("pageerror", lambda error: messages.append(str(error)))
    shown.on(
        "request",
        lambda request: None if request.url.startswith((url, "data:", "blob:")) else messages.append(request.url),
    )
    shown.goto(url)
    expect(shown.locator("#status")).to_have_text("2 models")
    yield shown
    assert [message for message in messages if "Failed to load resource" not in message] == []
    shown.close()


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Page]:
    with open_page(browser, url) as shown:
        yield shown


def ask(shown: Page, prompt: str = "Who are you?") -> None:
    shown.fill("#prompt", prompt)
    shown.press("#prompt", "Control+Enter")
    expect(shown.locator("#send")).to_be_enabled()


def answers(shown: Page) -> list[str]:
    return shown.locator(".answer").all_inner_texts()


def pieces(shown: Page, side: int) -> list[tuple[str, str | None]]:
    """The pieces of an answer, and how their log-probability differs from the other side's; None if that is unknown."""
    script = "spans => spans.map(span => [span.textContent, span.dataset.difference ?? null])"
    found = shown.eval_on_selector_all(f"section[data-side='{side}'] .answer span", script)
    return [(text, difference) for text, difference in found]


class TestInBrowser:
    pytestmark = pytest.mark.browser

    def test_both_answer_the_same_prompt(self, opened: Page, requests: list[dict[str, Any]]) -> None:
        ask(opened)
        assert answers(opened) == ["".join(ANSWERS["base"]), "".join(ANSWERS["legal"])]
        first, second = requests
        assert {first["model"], second["model"]} == {"base", "legal"}
        assert [{**request, "model": ""} for request in requests] == [{**first, "model": ""}] * 2
        assert (first["seed"], first["logprobs"], first["authorization"]) == (0, True, None)
        assert "tokens/s" in opened.inner_text("section[data-side='0'] .speed")

    def test_tokens_are_coloured_up_to_the_first_that_differs(self, opened: Page) -> None:
        ask(opened)
        assert pieces(opened, 0) == [("I", "0.000"), (" am", "2.000"), (" here", None), ("", None)]
        colour = "getComputedStyle(document.querySelectorAll('.answer span')[1]).backgroundColor"
        assert opened.evaluate(colour).startswith("rgba(11, 99, 196")

    def test_a_character_of_several_tokens_is_one_piece(self, opened: Page, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ANSWERS, "base", ["日", " here"])
        monkeypatch.setitem(ANSWERS, "legal", ["日", " there"])
        ask(opened, "parts")  # the first token is sent as two
        assert pieces(opened, 0) == [("日", None), (" here", "2.000"), ("", None)]

    def test_other_servers_have_no_strength(self, browser: Browser, requests: list[dict[str, Any]]) -> None:
        with (
            on_loopback(upstream(requests, "vllm")) as server,
            on_loopback(playground_app(server)) as url,
            open_page(browser, url) as opened,
        ):
            assert opened.locator("input[type=range]:disabled").count() == 2
            assert "The strength cannot be changed" in opened.inner_text("main")
            ask(opened)
        assert [request.get("lora_scale") for request in requests] == [None, None]

    def test_both_get_the_system_message_of_the_training_or_what_is_typed(
        self, browser: Browser, requests: list[dict[str, Any]]
    ) -> None:
        system = "Be brief.\nAlways."
        with (
            on_loopback(upstream(requests, system=system)) as server,
            on_loopback(playground_app(server)) as url,
            open_page(browser, url) as opened,
        ):
            expect(opened.locator("#system")).to_have_value(system)
            opened.select_option("section[data-side='1'] select", "base")
            expect(opened.locator("#system")).to_have_value("")
            opened.select_option("section[data-side='1'] select", "legal")
            for typed in (None, "Rhyme.", ""):  # an empty one leaves it out
                if typed is not None:
                    opened.fill("#system", typed)
                ask(opened)
        user = {"role": "user", "content": "Who are you?"}
        expected = [[{"role": "system", "content": text}, user] for text in (system, "Rhyme.", "") for _ in range(2)]
        assert [request["messages"] for request in requests] == expected

    def test_images_are_previewed_and_sent_as_data_urls(
        self, opened: Page, requests: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        files = [tmp_path / save_image(tmp_path / f"{color}.png", color) for color in ("red", "blue")]
        opened.set_input_files("#images", files)
        expect(opened.locator("#previews figcaption")).to_have_text(["red.png", "blue.png"])
        is_shown = "images => images.every(image => image.complete && image.naturalWidth === 28)"
        assert opened.eval_on_selector_all("#previews img", is_shown)
        ask(opened)
        urls = [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*images, {"type": "text", "text": "Who are you?"}]
        assert [request["messages"] for request in requests] == [[{"role": "user", "content": content}]] * 2
        opened.click("#remove")
        assert opened.locator("#previews img").count() == 0
        ask(opened)
        assert requests[-1]["messages"] == [{"role": "user", "content": "Who are you?"}]

    @pytest.mark.parametrize("modalities", [["text"], ["text", "image"]])
    def test_only_models_that_read_images_get_some(
        self, browser: Browser, requests: list[dict[str, Any]], modalities: list[str]
    ) -> None:
        with (
            on_loopback(upstream(requests, modalities=modalities)) as server,
            on_loopback(playground_app(server)) as url,
            open_page(browser, url) as opened,
        ):
            assert opened.is_visible("#images") == ("image" in modalities)

    @pytest.mark.slow
    def test_our_own_server(self, browser: Browser, tmp_path: Path) -> None:
        root = write_adapters(tmp_path)
        with running(root, allowed_hosts=LOCAL_HOSTS) as server, open_page(browser, server.url) as opened:

            def told(model: str) -> str:
                messages: Any = [{"role": "user", "content": "what is that"}]
                answer = server.client.chat.completions.create(
                    model=model, messages=messages, max_tokens=12, temperature=0
                )
                return str(answer.choices[0].message.content)

            def shown() -> list[str | None]:
                return [opened.locator(".answer").nth(side).text_content() for side in (0, 1)]

            opened.fill("#max-tokens", "12")
            opened.fill("section[data-side='1'] input[type=range]", "0.05")
            ask(opened, "what is that")
            assert shown() == [told("tiny"), told("legal@0.05")]
            assert all("".join(text for text, _ in pieces(opened, side)) == shown()[side] for side in (0, 1))
            differences = [[difference for _, difference in pieces(opened, side) if difference] for side in (0, 1)]
            assert all(differences)
            assert any(float(difference) for difference in differences[1])
            opened.fill("section[data-side='1'] input[type=range]", "0")
            ask(opened, "what is that")
            assert shown() == [told("tiny")] * 2

    def test_a_server_that_asks_for_a_key(self, browser: Browser, tmp_path: Path) -> None:
        with running(write_adapters(tmp_path), api_key="secret") as server:
            shown = browser.new_page()
            shown.goto(server.url)
            expect(shown.locator("#status")).to_contain_text("the API key is missing or wrong")
            shown.fill("#api-key", "secret")  # its field is shown
            shown.press("#api-key", "Enter")
            expect(shown.locator("#status")).to_have_text("2 models")
            shown.close()

    def test_the_strength_goes_to_the_adapter_alone(self, opened: Page, requests: list[dict[str, Any]]) -> None:
        assert opened.is_disabled("section[data-side='0'] input[type=range]")
        opened.fill("section[data-side='1'] input[type=range]", "0.5")
        opened.keyboard.press("s")  # the slider has the focus
        assert opened.input_value("section[data-side='0'] select") == "legal"
        ask(opened)
        assert {request["model"]: request.get("lora_scale") for request in requests} == {"legal": 0.5, "base": None}

    def test_blind_votes_are_counted_and_saved_as_preferences(self, opened: Page, tmp_path: Path) -> None:
        opened.check("#blind")
        for _ in range(4):
            ask(opened)
            assert opened.locator(".answer span").count() == 0  # colours would tell
            legal = next(i for i, answer in enumerate(answers(opened)) if "object" in answer)
            opened.locator("h1").click()
            opened.keyboard.press(str(legal + 1))
            assert opened.inner_text(f"section[data-side='{legal}'] .speed").endswith("this was legal")
        assert opened.inner_text("#tally") == (
            "base 0 : 4 legal: base wins 0% (95% interval 0% to 49%), legal is better"
        )
        with opened.expect_download() as download:
            opened.click("#save")
        download.value.save_as(tmp_path / "preferences.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
        assert (
            detect_schema("rows", [Row("rows", number, fields) for number, fields in enumerate(rows, 1)]).schema.task
            == PREFERENCE
        )
        assert rows == 4 * [
            {
                "prompt": [{"role": "user", "content": "Who are you?"}],
                "chosen": [{"role": "assistant", "content": "".join(ANSWERS["legal"])}],
                "rejected": [{"role": "assistant", "content": "".join(ANSWERS["base"])}],
            }
        ]

    def test_prompts_of_a_file(self, opened: Page, tmp_path: Path) -> None:
        rows = [
            {"prompt": "one"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]},
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        opened.set_input_files("#file", tmp_path / "rows.jsonl")
        expect(opened.locator("#prompt")).to_have_value("one")
        opened.locator("h1").click()
        opened.keyboard.press("n")
        assert opened.input_value("#prompt") == "two"
        assert opened.inner_text("#position") == "2 of 2"
        opened.keyboard.press("n")
        opened.keyboard.press("p")
        assert opened.input_value("#prompt") == "one"
        (tmp_path / "bad.jsonl").write_text("{")
        opened.set_input_files("#file", tmp_path / "bad.jsonl")
        expect(opened.locator("#status")).to_contain_text("Cannot use ")

    def test_adapters_are_loaded_and_unloaded(self, opened: Page, requests: list[dict[str, Any]]) -> None:
        opened.click("summary")
        opened.fill("#lora-name", "new")
        opened.fill("#lora-path", "missing")
        opened.fill("#admin-key", "secret")
        opened.click("#load")
        expect(opened.locator("#status")).to_have_text("missing does not exist")
        opened.fill("#lora-path", "folder")
        opened.click("#load")
        expect(opened.locator("#status")).to_have_text("new: done")
        assert requests[-1] == {"lora_name": "new", "lora_path": "folder", "authorization": "Bearer secret"}
        assert opened.locator("select").first.locator("option").all_inner_texts() == ["base", "legal", "new"]
        opened.click("#unload")
        expect(opened.locator("select").first.locator("option")).to_have_count(2)

    def test_errors_and_a_stop_are_shown(self, opened: Page) -> None:
        ask(opened, "fail")
        assert all("the queue is full" in answer for answer in answers(opened))
        assert opened.is_disabled("[data-vote='0']")
        opened.fill("#prompt", "endless")
        opened.click("#send")
        expect(opened.locator(".answer")).to_have_text(["I", "I"])
        opened.keyboard.press("Escape")
        expect(opened.locator("#send")).to_be_enabled()
        assert answers(opened) == ["I [stopped]"] * 2

    def test_it_fits_every_screen(self, opened: Page) -> None:
        ask(opened)
        opened.click("summary")
        for scheme, width in itertools.product(SCHEMES, (1100, 360)):
            opened.set_viewport_size({"width": width, "height": 900})
            opened.emulate_media(color_scheme=scheme)
            assert opened.evaluate(TOO_WIDE) == 0, (scheme, width)
            background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
