"""A server of a tiny model and two adapters, on loopback, and its clients."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import torch
import uvicorn
from fastapi import FastAPI
from tiny import GROUPED, chat_tokenizer, stir
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tailora import LoRAConfig, LoRAModel
from tailora.cli.serve import listen
from tailora.core.adapter_set import AdapterSet
from tailora.engine.continuous_batching import EngineName, make_engine
from tailora.engine.interface import Engine
from tailora.serve.app import Connection, HTTPServer, ServerSettings, create_app
from tailora.serve.registry import AdapterRegistry

TEXTS = ["the cat sat on the mat", "a dog ran away", "what is that", "good morning to you"]
TOKENIZER = chat_tokenizer(TEXTS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
CHAT = [{"role": "user", "content": "what is that"}]
AnyEngine = TypeVar("AnyEngine", bound=Engine)


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**GROUPED, initializer_range=0.2, max_position_embeddings=256, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


def write_adapters(folder: Path) -> Path:
    """Writes the adapters legal and poet into the folder, and returns it."""
    for seed, name in enumerate(["legal", "poet"]):
        model = LoRAModel(base_model(), LoRAConfig(r=2 + 2 * seed))
        stir(model, seed)
        model.save_adapter(folder / name)
    return folder


@dataclass
class Running:
    url: str
    app: Any
    client: openai.OpenAI
    http: httpx.Client


@contextmanager
def on_loopback(app: FastAPI) -> Iterator[str]:
    """The address of a server that runs this app."""
    listening = listen("127.0.0.1", 0)
    timeouts = {"timeout_graceful_shutdown": 5, "timeout_keep_alive": 60}  # clients give up idle connections before
    config = uvicorn.Config(app, http=Connection, log_level="critical", ws="none", **timeouts)
    core = getattr(app.state, "server", None)
    app.state.notes = []
    app.state.http = server = (
        uvicorn.Server(config) if core is None else HTTPServer(config, core, app.state.notes.append)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def started(engine: AnyEngine) -> Iterator[AnyEngine]:
    """Starts an engine and stops it, also when a test fails: Python waits for its thread at the end."""
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


@contextmanager
def running(
    root: Path,
    *,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    adapters: Sequence[str] = ("legal",),
    engine: EngineName = "auto",
    base_system: str | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server of the base, by default `base_model`, with these adapters of the folder.

    options: those of ServerSettings.
    """
    adapter_set = AdapterSet(base or base_model(), {})
    with started(make_engine(adapter_set, [2], engine, max_positions=200, max_requests=8)) as running_engine:
        registry = AdapterRegistry(adapter_set, running_engine.paused, "tiny", root, base_system=base_system)
        for name in adapters:
            registry.load(name, name)
        app = create_app(running_engine, registry, tokenizer, ServerSettings(**{"drain_seconds": 5, **options}))
        key = options.get("api_key") or "none"
        with (
            on_loopback(app) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
            httpx.Client(base_url=url, timeout=30) as http,
        ):
            yield Running(url, app, client, http)


def chat(server: Running, model: str, **options: Any) -> Any:
    settings = {"messages": CHAT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}, **options}
    return server.client.chat.completions.create(model=model, **settings)


class Forwards:
    """The forwards of a base: `count` have begun, and the first of them waits for `go_on`."""

    def __init__(self) -> None:
        self.count, self.is_held, self.go_on = 0, threading.Event(), threading.Event()

    def begin(self, *_: object) -> None:
        self.count += 1
        self.is_held.set()
        assert self.go_on.wait(60)


@contextmanager
def held_forwards(server: Running) -> Iterator[Forwards]:
    forwards = Forwards()
    hook = server.app.state.server.engine.adapter_set.base_model.register_forward_pre_hook(forwards.begin)
    try:
        yield forwards
    finally:
        forwards.go_on.set()
        hook.remove()
