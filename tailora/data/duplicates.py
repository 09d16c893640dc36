"""Rows that repeat or contradict each other: duplicates, also across the split, near duplicates, and contradictions.

Texts are compared as token ids. In a stream, `row_checks.RowCounts` finds the copies. MinHash finds near duplicates
without comparing all pairs:

    text -> set of shingles (3 tokens in a row) -> signature: the shingles' lowest value of each of 64 hash functions
    texts with 4 equal values in one of 16 bands are candidates, whose sets are then compared
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tailora.data.dataset import IGNORED, Example, Int32, group_equal

SHINGLE = 3  # tokens
HASHES, BAND = 64, 4
SIMILAR = 0.7  # share of the shingles of two examples that both have (Jaccard)
TEMPLATE = 0.5  # shingles in more than this share of the examples of each class are of a template or a system message
UInt64 = NDArray[np.uint64]


def duplicates(examples: Sequence[Example]) -> list[list[int]]:
    """Returns groups of indices of equal examples."""
    return [group for group in group_equal([example.hash for example in examples]) if len(group) > 1]


def copies(train: Iterable[tuple[bytes, str]], held_out: Iterable[tuple[bytes, str]]) -> Iterator[tuple[str, str]]:
    """Yields the name in WARNINGS and the location of each copy: on one side of the split, or across it.

    Both sides have the hash and the location of each example.
    """
    trained, evaluated = set[bytes](), set[bytes]()
    for examples, name, seen in ((train, "repeated", trained), (held_out, "eval_copies", evaluated)):
        for value, location in examples:
            if value in seen:
                yield name, location
            if seen is evaluated and value in trained:
                yield "duplicates", location
            seen.add(value)


def contradictions(examples: Sequence[Example]) -> list[list[int]]:
    """Returns groups of examples with the same prompt or text, and the same images, but different replies or labels.

    A text that is trained from its second token on has no prompt.
    """
    by_prompt: dict[bytes, dict[bytes, int]] = {}  # prompt -> reply -> the first example with it
    for index, example in enumerate(examples):
        ids, trained = example.input_ids, example.labels != IGNORED
        start, reply = int(np.argmax(trained)), example.labels[trained].tobytes()
        if example.target is not None:
            start, reply = len(ids), example.target.tobytes()
        elif (example.labels != ids)[trained].any():  # tags of words
            start = len(ids)
        if start > 1:
            by_prompt.setdefault(ids[:start].tobytes() + example.image_hashes, {}).setdefault(reply, index)
    return [sorted(replies.values()) for replies in by_prompt.values() if len(replies) > 1]


def near_duplicates(examples: Sequence[Example]) -> list[list[int]]:
    """Returns groups of similar examples with the same images, each similar to another. Equal examples count once."""
    chosen = [copies[0] for copies in group_equal([example.hash for example in examples])]
    shingles = [_shingles(examples[index].input_ids) for index in chosen]
    # a template is in most examples of each class; near duplicates may be most examples of one
    classes = group_equal([b"" if (of := examples[index].target) is None else of.tobytes() for index in chosen])
    counts = [Counter(shingle for row in rows for shingle in shingles[row].tolist()) for rows in classes]
    most = [TEMPLATE * len(rows) for rows in classes]
    frequent = [{part for part in of if of[part] > least} for of, least in zip(counts, most, strict=True)]
    in_all = set[int].intersection(*frequent) if frequent else set[int]()
    common = [part for part in in_all if sum(of[part] for of in counts) > 2]
    shingles = [np.setdiff1d(row, np.array(common, np.uint64)) for row in shingles]
    group_of = list(range(len(chosen)))  # an earlier example of the group, or the example itself

    def first_of(index: int) -> int:
        while group_of[index] != index:
            index = group_of[index]
        return index

    for left, right in _candidates(shingles, [examples[index].image_hashes for index in chosen]):
        first, second = sorted((first_of(left), first_of(right)))
        shared = len(np.intersect1d(shingles[left], shingles[right], assume_unique=True))
        if first != second and shared >= SIMILAR * (len(shingles[left]) + len(shingles[right]) - shared):
            group_of[second] = first
    groups = group_equal([first_of(index).to_bytes(8) for index in group_of])
    return [[chosen[index] for index in group] for group in groups if len(group) > 1]


def _shingles(ids: Int32) -> UInt64:
    """Returns the distinct hashes of every `SHINGLE` consecutive tokens; a shorter text has one hash."""
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), min(SHINGLE, len(ids)))
    hashes = np.zeros(len(windows), np.uint64)
    for column in windows.T:
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)  # modulo 2^64
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


def _candidates(shingles: Sequence[UInt64], images: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yields pairs that share a band and their images: each example with the first and with the previous one."""
    factors, offsets = np.random.default_rng(0).integers(2**63, size=(2, HASHES), dtype=np.uint64)
    factors = factors * np.uint64(2) + np.uint64(1)
    texts = [index for index, row in enumerate(shingles) if len(row)]
    # the high bits of a product are the random ones
    signatures = [((shingles[i][:, None] * factors + offsets) >> np.uint64(32)).min(0) for i in texts]  # (HASHES,)
    for start in range(0, HASHES, BAND):
        bands = [signature[start : start + BAND].tobytes() for signature in signatures]
        for bucket in group_equal([band + images[index] for index, band in zip(texts, bands, strict=True)]):
            for previous, index in pairwise(bucket):
                yield from {(texts[bucket[0]], texts[index]), (texts[previous], texts[index])}
