import json

import numpy as np
import pytest

from tailora.data.dataset import Example, Examples, count_repeats, dataset_hash, length_histogram


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2], [3, 900, 17, 17, 4000], list(range(1, 1025))])
def test_the_bins_cover_all_lengths_without_gap(lengths: list[int]) -> None:
    bins = length_histogram(np.array(lengths))
    assert sum(each.examples for each in bins) == len(lengths)
    assert (bins[0].low, bins[-1].high) == (min(lengths), max(lengths))
    assert [each.low for each in bins[1:]] == [each.high + 1 for each in bins[:-1]]
    for each in bins:
        assert each.examples == sum(each.low <= length <= each.high for length in lengths)


def test_the_hash_is_of_the_content_and_its_parts() -> None:
    def store(*documents: list[int]) -> Examples:
        return Examples.of(Example(np.array(ids, np.int32), np.array(ids, np.int32)) for ids in documents)

    known = dataset_hash(store([1, 2], [3]), store([4]))
    assert known == dataset_hash(store([1, 2], [3]), store([4]))
    others = [(store([1], [2, 3]), store([4])), (store([1, 2]), store([3], [4])), (store([1, 2], [3]), store([5]))]
    assert known not in {dataset_hash(*other) for other in others}


def test_repeats_count_copies_on_one_side_and_across() -> None:
    assert count_repeats([b"a", b"a", b"b"], [b"b", b"c", b"c"]) == (2, 1)


def test_bins_are_plain_numbers() -> None:
    assert json.dumps([each.low for each in length_histogram(np.array([1, 9]))])
