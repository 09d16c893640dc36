"""`tailora generate`: answers to prompts, once."""

import sys
from collections.abc import Iterable
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.console import print_json
from tailora.cli.flags import Json
from tailora.cli.models import Adapters, MaxNewTokens, Model, Quantize, Seed, Temperature, TopP, enough_memory, load
from tailora.errors import ConfigError

Prompts = Annotated[
    list[str] | None, Parameter(name="--prompt", negative=(), help="repeatable; without it stdin is one prompt")
]


def generate(
    *,
    model: Model = "demo",
    adapter: Adapters = None,
    prompt: Prompts = None,
    system: Annotated[str | None, Parameter(help="system message")] = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Answer prompts once; several adapters add up."""
    prompts = prompt or [_piped()]
    loaded = load(model, adapter or [], quantize)
    from tailora.evaluation.chat import reply

    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    first = [{"role": "system", "content": system}] if system else []
    answers = []
    for text in prompts:
        messages = [*first, {"role": "user", "content": text}]
        pieces = reply(loaded.model, loaded.tokenizer, messages, **sampling)
        with enough_memory():
            answers.append({"prompt": text, "text": "".join(pieces) if json else _streamed(pieces)})
    if json:
        print_json({"model": model, "adapters": loaded.adapters, "answers": answers})
    return 0


def _streamed(pieces: Iterable[str]) -> str:
    said = ""
    for piece in pieces:
        said += piece
        print(piece, end="", flush=True)
    print(flush=True)
    return said


def _piped() -> str:
    if sys.stdin.isatty():
        raise ConfigError("nothing to answer: give --prompt TEXT, or pipe a text in")
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("nothing to answer: stdin is empty; give --prompt TEXT, or pipe a text in")
    return text
