"""Duplicates, near duplicates and contradictions among tokenized rows."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tailora.data.dataset import IGNORED, Example
from tailora.data.duplicates import SHINGLE, SIMILAR, contradictions, duplicates, near_duplicates
from tailora.data.images import Image

BEGIN = list(range(1000, 1012))  # a template, in every text


def text(*tokens: int) -> Example:
    return Example.of_text(np.array([*BEGIN, *tokens], np.int32))


def example(prompt: list[int], reply: list[int], target: float | None = None) -> Example:
    is_trained = np.arange(len(prompt) + len(reply)) >= len(prompt)
    made = Example.of_text(np.array([*prompt, *reply], np.int32), is_trained)
    return made if target is None else Example(made.input_ids, made.labels, target=np.array([target]))


def test_duplicates_are_equal_examples() -> None:
    rows = [
        example([1, 2], [3]),
        example([1, 2], [4]),
        example([1, 2], [3]),
        example([1], [2, 3]),
        example([1, 2], [3]),
    ]
    assert duplicates(rows) == [[0, 2, 4]]


def test_contradictions_have_one_prompt_and_several_replies_or_labels() -> None:
    rows = [
        example([1, 2], [3]),
        example([1, 2], [4]),
        example([1, 2], [3]),
        example([1, 3], [4]),
        example([1, 2], [5]),
    ]
    assert contradictions(rows) == [[0, 1, 4]]
    texts = [example([1], [2, 3]), example([1], [4, 5])]
    assert contradictions(texts) == []  # they have no prompt
    labelled = [example([1, 2, 3], [], 0.0), example([1, 2, 3], [], 1.0), example([1, 2], [], 1.0)]
    assert contradictions(labelled) == [[0, 1]]
    words, tags = np.array([1, 7, 8], np.int32), [[IGNORED, 0, 2], [IGNORED, 1, 2], [IGNORED, 0, 2]]
    assert contradictions([Example(words, np.array(of_words, np.int32)) for of_words in tags]) == [[0, 1]]


def test_texts_about_different_images_are_neither_contradictions_nor_near_duplicates() -> None:
    image, other = (Image(None, sha256, 8, 8, "image") for sha256 in ("1", "2"))
    replies = [replace(example([1, 2], [3 + n]), images=(image,)) for n in range(2)]
    assert contradictions([*replies, replace(example([1, 2], [5]), images=(other,))]) == [[0, 1]]
    about = [(image, 600), (other, 601), (image, 602), (other, 603)]
    texts = [replace(text(*range(100, 140), last), images=(of_text,)) for of_text, last in about]
    others = [text(*(np.arange(40) * 7 + 300 * number)) for number in range(1, 8)]
    assert near_duplicates([*others, *texts]) == [[7, 9], [8, 10]]


def shingles(example: Example) -> set[tuple[int, ...]]:
    tokens = example.input_ids[len(BEGIN) - SHINGLE + 1 :].tolist()
    return {tuple(tokens[start : start + SHINGLE]) for start in range(len(tokens) - SHINGLE + 1)}


def test_near_duplicates_are_those_that_a_comparison_of_all_pairs_finds() -> None:
    """The template of all texts does not count."""
    generator = random.Random(0)
    texts = [text(*(generator.randrange(500) for _ in range(generator.randint(20, 40)))) for _ in range(60)]
    for source in range(0, 60, 3):  # copies with 1 or 2 other tokens
        copy = texts[source].input_ids.copy()
        for place in generator.sample(range(len(BEGIN), len(copy)), generator.randint(1, 2)):
            copy[place] = 600
        texts.append(Example.of_text(copy))
    pairs = set()
    for one in range(len(texts)):
        for other in range(one + 1, len(texts)):
            first, second = shingles(texts[one]), shingles(texts[other])
            if len(first & second) / len(first | second) >= SIMILAR:
                pairs.add((one, other))
    assert 5 < len(pairs) < 20  # of 20 copies
    assert sorted(map(tuple, near_duplicates(texts))) == sorted(pairs)


def test_near_duplicates_of_a_majority_class_are_no_template() -> None:
    """What is in the rows of all classes is one."""
    generator = random.Random(1)
    others = [[generator.randrange(500) for _ in range(30)] for _ in range(8)]
    copies = [[*range(500, 530), 600 + number] for number in range(12)]
    rows = [replace(text(*row), target=np.array([0.0])) for row in [*others[:4], *copies]]
    rows += [replace(text(*row), target=np.array([1.0])) for row in others[4:]]
    assert near_duplicates(rows) == [[*range(4, 16)]]
    template = [*BEGIN, *range(2000, 2100)]
    assert near_duplicates([text(*template, *template, *range(2100, 2200), *row) for row in others[:5]]) == []
    longer = [replace(row, input_ids=np.array([*template, *row.input_ids], np.int32)) for row in rows]
    assert near_duplicates(longer) == [[*range(4, 16)]]


def test_chains_of_similar_texts_are_one_group() -> None:
    base = list(range(100, 140))
    chain = [text(*base, *range(200, 200 + 3 * count)) for count in range(4)]
    others = [text(*(np.arange(40) * 7 + 300 * number)) for number in range(1, 8)]
    assert near_duplicates([*others, *chain, chain[0]]) == [[7, 8, 9, 10]]  # the last is a duplicate
    assert near_duplicates([]) == []


@pytest.mark.parametrize(("similar", "different"), [(2, 0), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4), (5, 4)])
def test_what_more_than_half_of_the_texts_and_more_than_two_have_is_a_template(similar: int, different: int) -> None:
    texts = [text(*range(100, 140), 600 + number) for number in range(similar)]
    texts += [text(*(np.arange(40) * 7 + 300 * number)) for number in range(1, different + 1)]
    is_template = similar > 2 and similar > different
    assert near_duplicates(texts) == ([] if is_template else [[*range(similar)]])
