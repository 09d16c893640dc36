"""passport.json: what is refused when it is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailora.errors import FormatError
from tailora.formats.run_folder import ADAPTER_WEIGHTS, PASSPORT
from tailora.verify.passport import (
    ADAPTER,
    BASE,
    REQUIRED,
    Passport,
    Probe,
    Variant,
    read_passport,
    write_passport,
)


def probe_of(tokens: list[str], values: list[float]) -> dict[str, Any]:
    return {"prompt_tokens": 4, "tokens": tokens, "logprobs": dict.fromkeys(REQUIRED, values), "text": "a b c d"}


PASSPORT_OF_BASE = Passport(
    "tiny", "base", {name: Variant("scale") for name in REQUIRED}, [Probe(**probe_of(["a", "b"], [-1.0, -2.0]))]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of weights with their passport."""
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"weights")
    write_passport(tmp_path, PASSPORT_OF_BASE)
    return tmp_path


def test_a_passport_belongs_to_its_weights(folder: Path) -> None:
    passport = read_passport(folder)
    assert passport.weights.keys() == {ADAPTER_WEIGHTS}
    assert replace(passport, weights={}) == PASSPORT_OF_BASE
    (folder / ADAPTER_WEIGHTS).write_bytes(b"other weights")
    with pytest.raises(FormatError, match="belongs to other weights"):
        read_passport(folder)
    (folder / PASSPORT).unlink()
    with pytest.raises(
        FormatError, match=r"contains no passport\.json: `tailora export .* --to peft --output NEW_FOLDER` writes one"
    ):
        read_passport(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"probes": []}, "probes: List should have at least 1 item"),
        ({"variants": {}}, "unknown variants: Q4_0 base, adapter"),
        ({"texts": "mine"}, "texts: "),
        (
            {"variants": {name: {"kind": "scale", "scale": 1e9} for name in REQUIRED}},
            "scale: Input should be less than or equal to 1000",
        ),
        ({"probes": [probe_of([], [])]}, "tokens: List should have at least 1 item"),
        ({"probes": [probe_of(["a"], [float("nan")])]}, "Input should be a finite number"),
        ({"probes": [probe_of(["a", "b"], [-1.0])]}, "probe 0 lacks log-probabilities"),
        ({"probes": [{**probe_of(["a"], [-1.0]), "logprobs": {ADAPTER: [-1.0], BASE: [-1.0]}}]}, "lacks the variants"),
    ],
)
def test_a_damaged_passport_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(content | change))
    with pytest.raises(FormatError, match=message):
        read_passport(folder)
