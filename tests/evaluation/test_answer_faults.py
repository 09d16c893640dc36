"""Faults of answers, against answers that were read and labelled.

looping_answers.jsonl has answers of SmolLM2-135M-Instruct, as it is and after training on examples/pirate.jsonl or the
demo's chats. `loops`: from some point on, the answer repeats a word, a phrase, a sentence or an item at least three
times without need, verbatim or nearly so. `is_arguable`: another reader may disagree. The labels are older than the
rule. Of 413 distinct answers, the file has all loops, all hard other ones, and a random part of the rest.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tailora.evaluation.answer_faults import faults_of

with Path(__file__).with_name("looping_answers.jsonl").open(encoding="utf-8") as file:
    ROWS: list[dict[str, Any]] = [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("rows", "least_recall", "least_precision"),
    [(ROWS, 0.9, 0.95), (ROWS[::2], 0.86, 0.96), (ROWS[1::2], 0.96, 0.96)],
    ids=["all", "one half", "other half"],
)
def test_loops_are_those_that_a_reader_sees(
    rows: list[dict[str, Any]], least_recall: float, least_precision: float
) -> None:
    are_found = [faults_of(row["text"]) == ["loop"] for row in rows]
    hits = sum(row["loops"] for row, is_found in zip(rows, are_found, strict=True) if is_found)
    assert hits / sum(row["loops"] for row in rows) >= least_recall
    assert hits / sum(are_found) >= least_precision


def test_the_labelled_answers_are_many_and_of_both_kinds() -> None:
    loops = sum(row["loops"] for row in ROWS)
    assert min(loops, len(ROWS) - loops) >= 100
    assert len({row["text"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Arrr! Arrr! Arrr!", ["loop"]),
        ("No. No. No.", []),
        ("Hip hip hooray! Hip hip hooray!", []),
        ("1. Luna\n2. Luna\n3. Luna\n4. Luna\n5. Luna\n6. Luna", ["loop"]),
        ("1. Luna\n2. Max\n3. Bella\n4. Rex\n5. Daisy\n6. Milo", []),
        ("我喜欢喝茶。我喜欢喝茶。我喜欢喝茶。", ["loop"]),
        ("我喜欢在早上喝茶，晚上读书。", []),
        (", ".join(map(str, range(1, 31))), []),
        ("The tide comes in, and boats rise with it. " + "We wait. " * 30, ["loop"]),
        (" \n\t", ["empty"]),
        ("\ud800", []),
    ],
)
def test_an_answer_has_the_fault_that_one_sees(text: str, expected: list[str]) -> None:
    assert faults_of(text) == expected


@pytest.mark.parametrize(
    ("is_cut", "reference_tokens", "expected"),
    [(True, 63, ["cut"]), (True, 64, []), (True, 0, []), (False, 63, [])],
)
def test_an_answer_is_cut_off_only_if_the_reference_and_its_end_fit(
    is_cut: bool, reference_tokens: int, expected: list[str]
) -> None:
    assert faults_of("Well,", tokens=64, is_cut=is_cut, reference_tokens=reference_tokens) == expected
    assert faults_of("Arrr! " * 9, tokens=64, is_cut=is_cut, reference_tokens=reference_tokens) == ["loop"]
