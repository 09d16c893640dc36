"""passport.json, the verification file of an adapter: prompts and the log-probabilities of their next tokens.

It is stored next to the weights, and `tailora verify` compares a server's answers with it. Every probe has the
log-probabilities of a few tokens with the adapter at several scales: at 1 as trained, at 0 the base alone. Importing
this needs no torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from tailora.errors import FormatError
from tailora.formats.io import read_own_json, wrap_os_error, write_file
from tailora.formats.run_folder import PASSPORT

ADAPTER, BASE = 1.0, 0.0  # scales
NOISE_FLOOR = 0.05  # nats; the effect of 16-bit arithmetic
WEIGHTS = re.compile(r".*\.(safetensors|gguf)")
Scale = Annotated[float, Field(ge=0, le=1000)]
LogProb = Annotated[FiniteFloat, Field(ge=-1000, le=1e-3)]


@dataclass(frozen=True)
class Probe:
    """A prompt and its next token.

    on_q4_0: the same for the adapter and the base, with weights rounded as in llama.cpp's Q4_0.
    """

    prompt_tokens: int  # the number of tokens of the prompt
    tokens: Annotated[list[str], Field(min_length=1)]  # texts of a few likely tokens
    logprobs: dict[Scale, list[LogProb]]  # scale of the adapter -> log-probability of each of `tokens` after the prompt
    on_q4_0: dict[Scale, list[LogProb]]
    text: str | None = None  # of a plain completion; None for a chat
    messages: list[dict[str, str]] | None = None  # of a chat; None for a plain completion
    rendered: str | None = None  # their text under the chat template


@dataclass(frozen=True, kw_only=True)
class Passport:
    """The content of a verification file.

    weights: name of each file of weights next to passport.json -> its SHA-256.
    """

    version: Literal[3] = 3
    base_model: str
    probes: Annotated[list[Probe], Field(min_length=1)]
    weights: dict[str, str] = field(default_factory=dict)


def write_passport(folder: Path, passport: Passport) -> Path:
    """Writes passport.json for the weights in `folder`. Raises WriteError."""
    write_file(folder / PASSPORT, passport_bytes(replace(passport, weights=weight_hashes(folder))))
    return folder / PASSPORT


def passport_bytes(passport: Passport) -> bytes:
    return json.dumps(asdict(passport), ensure_ascii=False).encode()


def read_passport(folder: Path) -> Passport:
    """Raises FormatError, with a remedy, if it is missing, damaged or does not belong to the weights in `folder`."""
    remedy = f"create one with `tailora verify --prepare --adapter {folder}`"
    if not (folder / PASSPORT).exists():
        raise FormatError(f"{folder} contains no {PASSPORT}; {remedy}")
    passport = read_own_json(folder / PASSPORT, Passport, remedy)
    if problems := list(_problems(passport)):
        raise FormatError(f"{folder / PASSPORT} is damaged ({problems[0]}); {remedy}")
    hashes = weight_hashes(folder)
    if not passport.weights or any(hashes.get(name) != digest for name, digest in passport.weights.items()):
        raise FormatError(f"{folder / PASSPORT} does not belong to the weights next to it; {remedy}")
    return passport


def _problems(passport: Passport) -> Iterable[str]:
    scales = passport.probes[0].logprobs.keys()
    for number, probe in enumerate(passport.probes):
        if (probe.text is None) == (probe.messages is None):
            yield f"probe {number} needs either a text or messages"
        if probe.logprobs.keys() != scales or not scales >= {ADAPTER, BASE} or probe.on_q4_0.keys() != {ADAPTER, BASE}:
            yield f"probe {number} lacks scales"
        if any(len(values) != len(probe.tokens) for values in (*probe.logprobs.values(), *probe.on_q4_0.values())):
            yield f"probe {number} lacks log-probabilities"


def weight_hashes(folder: Path) -> dict[str, str]:
    """Returns name -> SHA-256 of the files of weights in a folder."""
    with wrap_os_error(folder):
        hashes = {}
        for path in sorted(folder.iterdir()):
            if WEIGHTS.fullmatch(path.name):
                with path.open("rb") as file:
                    hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes
