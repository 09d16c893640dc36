"""A small model with a passport, a server of it with faults, and a stand-in of other servers."""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_server
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tiny import GROUPED, chat_tokenizer, stir
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.verify.passport import Passport, write_passport
from tailora.verify.probes import QUESTIONS, make_passport
from tailora.verify.server_client import ServerClient
from tailora.verify.server_verdict import Verification, verify

TOKENIZER = chat_tokenizer(
    [*QUESTIONS, "a good morning to you and to the cat"], eos_token="<|im_end|>", bos_token="<|im_start|>"
)

OTHER_BASE = "other_base"  # folder of an adapter of another base


def base_model(seed: int = 0, **more: int) -> LlamaForCausalLM:
    """more: of its configuration."""
    torch.manual_seed(seed)
    sizes = {**GROUPED, "num_hidden_layers": 4, "vocab_size": len(TOKENIZER), **more}
    config = LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=256, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


def adapted(seed: int, base: PreTrainedModel | None = None) -> LoRAModel:
    model = LoRAModel(base_model() if base is None else base, LoRAConfig(r=4))
    stir(model, seed)
    return model


def save_without(folder: Path, is_missing: Callable[[str], bool]) -> None:
    """Saves the adapter with updates of 0 in some layers."""
    model = adapted(0)
    for path, layer in model.adapter().low_rank.items():
        if is_missing(path):
            torch.nn.init.zeros_(layer.lora_B)
    model.save_adapter(folder)


def write_adapters(folder: Path) -> Path:
    """Writes the adapter `legal` with its passport, another one, and faulty copies into the folder, and returns it."""
    model = adapted(0)
    model.save_adapter(folder / "legal")
    write_passport(folder / "legal", make_passport(model, TOKENIZER))
    adapted(1).save_adapter(folder / "other")
    LoRAModel(base_model(1), LoRAConfig(r=4)).save_adapter(folder / OTHER_BASE / "legal")  # it changes nothing
    save_without(folder / "upper", lambda path: int(path.split(".")[2]) < 2)
    save_without(folder / "mlp", lambda path: "attn" in path)
    return folder


@contextmanager
def running(root: Path, *, seed: int = 0, template: str | None = None) -> Iterator[str]:
    """Yields the address of a server. seed: of its base's weights.    template: of its chats."""
    tokenizer = TOKENIZER if template is None else copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template or TOKENIZER.chat_template
    adapters = ("legal", "other", "upper", "mlp") if seed == 0 else ("legal",)
    folder = root if seed == 0 else root / OTHER_BASE
    with tiny_server.running(folder, base=base_model(seed), tokenizer=tokenizer, adapters=adapters) as server:
        yield server.url


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with running(root) as url:
        yield url


def verdict_of(url: str, passport: Passport, model: str, base: str | None = None) -> Verification:
    with ServerClient(url) as server:
        of_base = None if base is None else server.ask(passport.probes, base)
        return verify(passport, server.ask(passport.probes, model), of_base)


class StandIn(BaseHTTPRequestHandler):
    """A server that answers as `answers` says: path -> status and body; of status 307 the address that it leads to.

    most: log-probabilities that it tells; it refuses requests for more.    requests: what it is asked.
    """

    answers: dict[str, tuple[int, Any]]
    most = 20
    requests: list["Request"]

    def reply(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        request = Request(self.path, self.headers.get("Authorization"), asked)
        self.requests.append(request)
        status, body = self.answers.get(self.path, (404, {"error": "not found"}))
        if (request.top or 0) > self.most:
            status, body = 400, {"error": "too many log-probabilities"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", body)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = reply

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Request:
    path: str
    key: str | None
    body: dict[str, Any]

    @property
    def top(self) -> int | None:
        """The number of log-probabilities that it asks for."""
        top: int | None = self.body.get("logprobs" if "prompt" in self.body else "top_logprobs")
        return top


def stand_in(
    answers: dict[str, tuple[int, Any]], *, most: int = 20, requests: list[Request] | None = None
) -> AbstractContextManager[str]:
    kept = [] if requests is None else requests
    return serving(type("Handler", (StandIn,), {"answers": answers, "most": most, "requests": kept}))


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


MODELS = {"/v1/models": (200, {"data": [{"id": "legal"}]})}


def through_gguf(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> what llama.cpp computes with if it stores this in Q4_0."""
    whole = functional.pad(weight.detach(), (0, -weight.shape[1] % 32))  # gguf takes only whole groups
    stored = quantize(whole.numpy(), GGMLQuantizationType.Q4_0)
    return torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_0))[:, : weight.shape[1]]


def store_in_q4_0(model: PreTrainedModel) -> PreTrainedModel:
    """As llama.cpp does, which keeps the output head in more bits."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = through_gguf(module.weight)
        elif isinstance(module, Conv1D):
            module.weight.data = through_gguf(module.weight.T.contiguous()).T
    return model
