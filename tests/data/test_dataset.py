"""Examples in flat arrays, the split, the report."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tailora.data.dataset import (
    IGNORED,
    Example,
    Examples,
    Mixture,
    cut_into_blocks,
    dataset_hash,
    length_histogram,
    split_examples,
)
from tailora.errors import DataError

# ---- Examples

THREE = [([1, 2, 3], [IGNORED, 2, 3]), ([4], [IGNORED]), ([5, 6], [IGNORED, IGNORED])]


@pytest.fixture
def examples() -> Examples:
    pairs = [(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in THREE]
    return Examples.of(Example(*pair, row) for row, pair in zip([3, 5, 8], pairs, strict=True))


def test_examples_are_returned_as_they_were_stored(examples: Examples) -> None:
    assert [(e.input_ids.tolist(), e.labels.tolist()) for e in examples] == THREE
    assert [example.source_index for example in examples] == [3, 5, 8]
    assert examples[-1].source_index == 8
    assert [example.source_index for example in examples.select([2, 0])] == [8, 3]
    assert examples.input_ids.dtype == examples.labels.dtype == np.int32


def test_the_first_token_of_a_text_is_never_trained_since_nothing_predicts_it() -> None:
    ids = np.array([4, 5, 6], np.int32)
    for is_trained in (True, np.array([True, True, True])):
        assert Example.of_text(ids, is_trained).labels.tolist() == [IGNORED, 5, 6]
    assert ids.tolist() == [4, 5, 6]
    assert Example.of_text(ids, np.array([True, False, True])).labels.tolist() == [IGNORED, IGNORED, 6]
    assert Example.of_text(ids[:0]).labels.dtype == np.int32


def test_trained_tokens_are_counted(examples: Examples) -> None:
    assert examples.lengths.tolist() == [3, 1, 2]
    assert examples.supervised.tolist() == [2, 0, 0] == [example.supervised for example in examples]


def test_there_may_be_no_examples(examples: Examples) -> None:
    none = examples.select([])
    assert (len(none), none.lengths.tolist(), none.supervised.tolist(), list(none)) == (0, [], [], [])


def test_an_index_out_of_range_is_an_error(examples: Examples) -> None:
    with pytest.raises(IndexError, match="example 3 of 3"):
        examples[3]


def test_hashes_are_equal_if_ids_and_labels_are(examples: Examples) -> None:
    first, other, last = examples.select([0, 0, 1]).hashes()
    assert first == other != last
    relabelled = Example.of_text(examples[0].input_ids, False)
    assert Examples.of([relabelled]).hashes() != [first]


def test_rows_that_share_an_example_are_different_rows() -> None:
    one, two, shared = (Example.of_text(np.array([1, token], np.int32)) for token in (2, 3, 4))
    rows = [(one, 0), (shared, 0), (two, 1), (shared, 1), (one, 2), (shared, 2)]
    hashes = Examples.of(replace(example, source_index=row) for example, row in rows).row_hashes()
    first, second, copy = hashes[::2]
    assert hashes[1::2] == [first, second, copy]
    assert first == copy != second


# ---- Mixtures of sources

EPOCHS = 12


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [((6, 4), (2, 0.5), [12, 2]), ((5,), (0.7,), [4]), ((3, 7, 1), (1.4, 1, 0.1), [4, 7, 1])],
)
def test_every_example_of_a_source_is_seen_equally_often(sizes, weights, counts) -> None:
    mixture = Mixture(sizes, weights)
    assert mixture.counts == counts
    epochs = [mixture.epoch(number, seed=3) for number in range(EPOCHS)]
    first = 0
    for size, count in zip(sizes, counts, strict=True):
        chosen = [epoch[(epoch >= first) & (epoch < first + size)] - first for epoch in epochs]
        assert {len(part) for part in chosen} == {count}
        for number in range(1, EPOCHS + 1):
            seen = np.bincount(np.concatenate(chosen[:number]), minlength=size)
            assert seen.max() - seen.min() <= 1
        first += size
    assert all(epoch.max() < sum(sizes) for epoch in epochs)


def test_a_half_is_followed_by_the_other_half_and_drawn_with_the_seed() -> None:
    mixture = Mixture((20,), (0.5,))
    halves = [mixture.epoch(number, seed=0) for number in range(4)]
    for first, second in (halves[:2], halves[2:]):
        assert sorted([*first, *second]) == list(range(20))
    assert halves[0].tolist() != halves[2].tolist()
    assert halves[0].tolist() == mixture.epoch(0, seed=0).tolist() != mixture.epoch(0, seed=1).tolist()


def test_an_epoch_without_weights_has_every_example_once(examples: Examples) -> None:
    assert (examples.epoch_size, examples.epoch(5, seed=1).tolist(), examples.mean_length) == (3, [0, 1, 2], 2)


def test_the_mean_length_is_that_of_an_epoch(examples: Examples) -> None:
    assert replace(examples, mixture=Mixture((1, 2), (4, 1))).mean_length == (4 * 3 + 1 + 2) / 6


# ---- Documents in blocks


def document(*ids: int, row: int = 0) -> Example:
    return replace(Example.of_text(np.array(ids, np.int32)), source_index=row)


@pytest.mark.parametrize("concatenated", [False, True])
@pytest.mark.parametrize("sizes", [[2], [9], [4, 2, 11, 5], [5, 5, 5], [2] * 20, [40, 3]])
@pytest.mark.parametrize("length", [2, 5, 8])
def test_every_token_of_a_document_is_learned_once(sizes: list[int], length: int, concatenated: bool) -> None:
    ends = np.cumsum([0, *sizes])
    documents = [document(*range(start, end), row=i) for i, (start, end) in enumerate(pairwise(ends))]
    blocks = list(cut_into_blocks(documents, length, concatenated=concatenated))
    learned = np.concatenate([block.labels[block.labels != IGNORED] for block in blocks]).tolist()
    first = [0] if concatenated else ends[:-1].tolist()  # nothing predicts these
    assert learned == [token for token in range(ends[-1]) if token not in first]
    assert all(2 <= len(block.input_ids) <= length for block in blocks)
    for block in blocks:
        assert block.input_ids.tolist() == list(range(block.input_ids[0], block.input_ids[-1] + 1))
        assert block.labels.tolist() == [IGNORED, *block.input_ids[1:].tolist()]
    if concatenated:
        assert {len(block.input_ids) for block in blocks[:-1]} <= {length}
    else:
        assert all(ends[block.source_index] <= block.input_ids[0] for block in blocks)
        assert all(block.input_ids[-1] < ends[block.source_index + 1] for block in blocks)


# ---- Split

DIFFERENT = [bytes([number]) for number in range(200)]


@pytest.mark.parametrize(("share", "held"), [(0.05, 10), (0.5, 100), (0.001, 1), (0.999, 199)])
def test_every_example_is_on_one_side_and_the_share_is_kept(share: float, held: int) -> None:
    train, held_out = split_examples(DIFFERENT, share, seed=0)
    assert len(held_out) == held
    assert sorted(train + held_out) == list(range(200))


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_never_on_both_sides(seed: int) -> None:
    keys = [bytes([number % 7]) for number in range(50)]
    train, held_out = split_examples(keys, 0.3, seed)
    assert train
    assert held_out
    assert not {keys[place] for place in train} & {keys[place] for place in held_out}


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_group_is_held_out_when_all_are_larger_than_the_share(seed: int) -> None:
    assert split_examples([b"a"] * 9 + [b"b"] * 3, 0.05, seed)[1] == [9, 10, 11]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "held"), [(0.2, [20, 8, 2, 0]), (0.5, [50, 20, 5, 1]), (0.1, [10, 4, 1, 0])])
def test_of_each_class_the_same_share_is_held_out(share: float, held: list[int], seed: int) -> None:
    classes = np.repeat([0, 1, 2, 3], [100, 40, 10, 1]).tolist()
    _, held_out = split_examples(DIFFERENT[:151], share, seed, classes=classes)
    counts = np.bincount([classes[index] for index in held_out], minlength=4)
    assert np.abs(counts - held).max() <= 1
    assert counts.sum() == round(151 * share)
    other = split_examples(DIFFERENT[:151], share, seed + 1, classes=classes)
    assert held_out != other[1]


@pytest.mark.parametrize("keys", [[b"a"], [b"a", b"a"]])
def test_a_single_distinct_example_cannot_be_split(keys: list[bytes]) -> None:
    with pytest.raises(
        DataError, match=r"^need two distinct .*, got (1 example|2 examples, 1 distinct); .*--validation-split 0"
    ):
        split_examples(keys, 0.05, 0)


# ---- Report


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2], [3, 900, 17, 17, 4000], list(range(1, 1025))])
def test_the_bins_cover_all_lengths_without_gap(lengths: list[int]) -> None:
    bins = length_histogram(np.array(lengths))
    assert json.dumps(bins)  # plain numbers
    assert sum(each["examples"] for each in bins) == len(lengths)
    assert (bins[0]["low"], bins[-1]["high"]) == (min(lengths), max(lengths))
    assert [each["low"] for each in bins[1:]] == [each["high"] + 1 for each in bins[:-1]]
    for each in bins:
        assert each["examples"] == sum(each["low"] <= length <= each["high"] for length in lengths)


def test_the_hash_is_of_the_content_and_its_parts() -> None:
    def store(*documents: list[int]) -> Examples:
        return Examples.of(Example.of_text(np.array(ids, np.int32)) for ids in documents)

    known = dataset_hash(store([1, 2], [3]), store([4]))
    assert known == dataset_hash(store([1, 2], [3]), store([4]))
    others = [(store([1], [2, 3]), store([4])), (store([1, 2]), store([3], [4])), (store([1, 2], [3]), store([5]))]
    assert known not in {dataset_hash(*other) for other in others}
