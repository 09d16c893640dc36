"""passport.json, the verification file of an adapter: prompts and the log-probabilities of their next tokens.

It is stored next to the weights, and `tailora verify` compares a server's answers with it. Every probe has the
log-probabilities of a few tokens under many variants: the adapter as trained, the base alone, other scales, the
adapter without some of its layers, wrong prompts. Importing this needs no torch.
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

VERSION = 2
ADAPTER, BASE = "adapter", "base"  # names of variants
ROUNDED_ADAPTER, ROUNDED_BASE = "adapter on a Q4_0 base", "Q4_0 base"
NOISE_FLOOR = 0.05  # nats; the effect of 16-bit arithmetic
WEIGHTS = re.compile(r".*\.(safetensors|gguf)")
LogProb = Annotated[FiniteFloat, Field(ge=-1000, le=1e-3)]


@dataclass(frozen=True)
class Variant:
    """One way to compute the answers.

    kind: "scale": the adapter at a different scale; "part": with some layers missing; "prompt": the adapter with a
        different prompt; "rounding": the adapter or the base, with weights rounded as in llama.cpp's Q4_0.
    scale: relative to training; 0 is the base.
    """

    kind: Literal["scale", "part", "prompt", "rounding"]
    scale: Annotated[float, Field(ge=0, le=1000)] = 1.0


REQUIRED = {
    ADAPTER: Variant("scale"),
    BASE: Variant("scale", 0.0),
    ROUNDED_ADAPTER: Variant("rounding"),
    ROUNDED_BASE: Variant("rounding", 0.0),
}


@dataclass(frozen=True)
class Probe:
    """A prompt and its next token.

    text: of a plain completion; None for a chat.
    messages: of a chat; None for a plain completion.
    rendered: their text under the chat template.
    prompt_tokens: the number of tokens of the prompt.
    tokens: texts of a few likely tokens.
    logprobs: variant -> log-probability of each of `tokens` after the prompt.
    is_control: the adapter changes little here, so differences of a server are its rounding.
    """

    prompt_tokens: int
    tokens: Annotated[list[str], Field(min_length=1)]
    logprobs: dict[str, list[LogProb]]
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    rendered: str | None = None
    is_control: bool = False


@dataclass(frozen=True)
class Passport:
    """base_model: its name.
    weights: name of each file of weights next to passport.json -> its SHA-256.
    texts: source of the probes' texts, "base" or "held-out".
    """

    base_model: str
    texts: Literal["base", "held-out"]
    variants: dict[str, Variant]
    probes: Annotated[list[Probe], Field(min_length=1)]
    weights: dict[str, str] = field(default_factory=dict)
    version: int = VERSION


def write_passport(folder: Path, passport: Passport) -> Path:
    """Writes passport.json for the weights in `folder`. Raises WriteError."""
    write_file(folder / PASSPORT, passport_bytes(replace(passport, weights=weight_hashes(folder))))
    return folder / PASSPORT


def passport_bytes(passport: Passport) -> bytes:
    return json.dumps(asdict(passport), ensure_ascii=False).encode()


def read_passport(folder: Path, remedy: str | None = None) -> Passport:
    """Raises FormatError, with the remedy, if it is missing, damaged or does not belong to the weights in `folder`."""
    remedy = remedy or f"create one with `tailora verify --prepare --adapter {folder}`"
    if not (folder / PASSPORT).exists():
        raise FormatError(f"{folder} contains no {PASSPORT}; {remedy}")
    passport = read_own_json(folder / PASSPORT, Passport, remedy)
    if passport.version != VERSION:
        versions = f"has version {passport.version}, but version {VERSION} is required"
        raise FormatError(f"{folder / PASSPORT} {versions}; {remedy}")
    if problems := list(_problems(passport)):
        raise FormatError(f"{folder / PASSPORT} is damaged ({problems[0]}); {remedy}")
    hashes = weight_hashes(folder)
    if not passport.weights or any(hashes.get(name) != digest for name, digest in passport.weights.items()):
        raise FormatError(f"{folder / PASSPORT} does not belong to the weights next to it; {remedy}")
    return passport


def _problems(passport: Passport) -> Iterable[str]:
    if wrong := [name for name, variant in REQUIRED.items() if passport.variants.get(name) != variant]:
        yield f"it lacks the variants {', '.join(wrong)}"
    for number, probe in enumerate(passport.probes):
        if (probe.text is None) == (probe.messages is None):
            yield f"probe {number} needs either a text or messages"
        if unknown := probe.logprobs.keys() - passport.variants.keys():
            yield f"probe {number} has unknown variants: {', '.join(sorted(unknown))}"
        if missing := REQUIRED.keys() - probe.logprobs.keys():
            yield f"probe {number} lacks the variants {', '.join(sorted(missing))}"
        if any(len(values) != len(probe.tokens) for values in probe.logprobs.values()):
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
