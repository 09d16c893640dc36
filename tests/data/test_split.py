import pytest

from tailora.data.dataset import group_equal, split_examples
from tailora.errors import DataError

DIFFERENT = [bytes([number]) for number in range(200)]


@pytest.mark.parametrize(("share", "held"), [(0.05, 10), (0.5, 100), (0.001, 1), (0.999, 199)])
def test_every_example_is_on_one_side_and_the_share_is_kept(share: float, held: int) -> None:
    sides = split_examples(DIFFERENT, share, seed=0)
    assert len(sides.held_out) == held
    assert sorted(sides.train + sides.held_out) == list(range(200))


def test_the_seed_alone_decides() -> None:
    assert split_examples(DIFFERENT, 0.1, 3) == split_examples(DIFFERENT, 0.1, 3) != split_examples(DIFFERENT, 0.1, 4)


@pytest.mark.parametrize("seed", range(20))
def test_copies_never_stand_on_both_sides(seed: int) -> None:
    keys = [bytes([number % 7]) for number in range(50)]
    sides = split_examples(keys, 0.3, seed)
    assert min(map(len, sides)) > 0
    assert not {keys[place] for place in sides.train} & {keys[place] for place in sides.held_out}


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_group_is_held_out_when_all_are_larger_than_the_share(seed: int) -> None:
    assert split_examples([b"a"] * 9 + [b"b"] * 3, 0.05, seed).held_out == [9, 10, 11]


def test_a_share_of_nothing_holds_out_nothing() -> None:
    assert split_examples([b"a", b"a"], 0, 0) == ([0, 1], [])


@pytest.mark.parametrize("keys", [[b"a"], [b"a", b"a"]])
def test_one_different_example_cannot_be_parted(keys: list[bytes]) -> None:
    with pytest.raises(
        DataError, match=r"1 different example in \d rows: none can be held out; .*--validation-split 0"
    ):
        split_examples(keys, 0.05, 0)


def test_groups_hold_the_places_of_equal_keys() -> None:
    assert group_equal([b"a", b"b", b"a"]) == [[0, 2], [1]]
