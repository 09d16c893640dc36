"""passport.json: what is refused when it is read."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailora.errors import FormatError
from tailora.formats.run_folder import ADAPTER_WEIGHTS, PASSPORT
from tailora.verify.passport import ADAPTER, BASE, Passport, Probe, read_passport, write_passport
from tailora.verify.server_verdict import Observation, verify


def probe_of(tokens: list[str], values: list[float]) -> dict[str, Any]:
    logprobs = {BASE: values, ADAPTER: values}
    return {"prompt_tokens": 4, "tokens": tokens, "logprobs": logprobs, "on_q4_0": logprobs, "text": "a b c d"}


PASSPORT_OF_BASE = Passport(base_model="tiny", probes=[Probe(**probe_of(["a", "b"], [-1.0, -2.0]))])


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
    with pytest.raises(FormatError, match="does not belong to the weights"):
        read_passport(folder)
    (folder / PASSPORT).unlink()
    with pytest.raises(
        FormatError,
        match=r"contains no passport\.json; create one with `tailora verify --prepare --adapter .*`",
    ):
        read_passport(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: Input should be 3"),
        ({"probes": []}, "probes: List should have at least 1 item"),
        ({"probes": [probe_of(["a"], [0.5])]}, "should be less than or equal to 0.001"),
        ({"probes": [{**probe_of(["a"], [-1.0]), "logprobs": {BASE: [-1.0], 1e9: [-1.0]}}]}, "equal to 1000"),
        ({"probes": [probe_of([], [])]}, "tokens: List should have at least 1 item"),
        ({"probes": [probe_of(["a"], [float("nan")])]}, "Input should be a finite number"),
        ({"probes": [probe_of(["a", "b"], [-1.0])]}, "probe 0 lacks log-probabilities"),
        ({"probes": [{**probe_of(["a"], [-1.0]), "logprobs": {BASE: [-1.0]}}]}, "probe 0 lacks scales"),
        ({"probes": [{**probe_of(["a"], [-1.0]), "text": None}]}, "probe 0 needs either a text or messages"),
    ],
)
def test_a_damaged_passport_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(content | change))
    with pytest.raises(FormatError, match=message):
        read_passport(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "1.0", 1e308, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0.0", "1.0", "a"]), inner),
)


@given(st.data())
def test_a_passport_of_any_content_is_refused_or_gives_a_verdict(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("passport")
    (folder / ADAPTER_WEIGHTS).write_bytes(b"weights")
    write_passport(folder, replace(PASSPORT_OF_BASE, probes=PASSPORT_OF_BASE.probes * 8))
    place = content = json.loads((folder / PASSPORT).read_text())
    for _ in range(data.draw(st.integers(0, 4))):  # deeper and deeper
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        inner = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))] = data.draw(VALUES)
    (folder / PASSPORT).write_text(json.dumps(content))
    with suppress(FormatError):
        passport = read_passport(folder)
        values = data.draw(st.lists(st.floats(-50, 0), min_size=2, max_size=2))
        answer = Observation(0, dict(enumerate(values)), data.draw(st.none() | st.floats(-50, 0)))
        verify(passport, [answer] * len(passport.probes), [Observation(None)] * len(passport.probes))
