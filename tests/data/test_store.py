import numpy as np
import pytest

from tailora.data.dataset import IGNORED, Example, Examples

THREE = [([1, 2, 3], [IGNORED, 2, 3]), ([4], [4]), ([5, 6], [5, IGNORED])]


@pytest.fixture
def examples() -> Examples:
    pairs = [(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in THREE]
    return Examples.of(Example(*pair, row) for row, pair in zip([3, 5, 8], pairs, strict=True))


def test_what_went_in_comes_out(examples: Examples) -> None:
    assert [(e.input_ids.tolist(), e.labels.tolist()) for e in examples] == THREE
    assert [example.source_index for example in examples] == [3, 5, 8]
    assert examples[-1].source_index == 8
    assert examples.input_ids.dtype == examples.labels.dtype == np.int32


def test_lengths_and_learned_tokens_are_counted_after_the_shift(examples: Examples) -> None:
    assert examples.lengths.tolist() == [3, 1, 2]
    assert examples.supervised.tolist() == [2, 0, 0] == [example.supervised for example in examples]


def test_a_selection_keeps_the_order_asked_for(examples: Examples) -> None:
    chosen = examples.select([2, 0])
    assert [example.source_index for example in chosen] == [8, 3]
    assert chosen[1].input_ids.tolist() == [1, 2, 3]


def test_no_examples_are_a_store_too(examples: Examples) -> None:
    none = examples.select([])
    assert (len(none), none.lengths.tolist(), none.supervised.tolist(), list(none)) == (0, [], [], [])


def test_a_place_outside_is_an_error(examples: Examples) -> None:
    with pytest.raises(IndexError, match="example 3 of 3"):
        examples[3]


def test_keys_are_equal_where_ids_and_labels_are(examples: Examples) -> None:
    first, other, last = examples.select([0, 0, 1]).hashes()
    assert first == other != last
    relabelled = Example(examples[0].input_ids, examples[0].input_ids)
    assert Examples.of([relabelled]).hashes() != [first]
