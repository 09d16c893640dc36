from dataclasses import replace
from functools import partial
from itertools import chain, islice, product

import numpy as np
import pytest
from runs import ONE_PASS

from tailora.data.dataset import Example, Examples, Mixture
from tailora.data.labels import Labels
from tailora.errors import DataError
from tailora.train.classification import label_task
from tailora.train.dataloader import (
    Step,
    StepShape,
    TrainingData,
    dataset_steps,
    epoch_batches,
    largest_forward,
    plan_batches,
    split_by_tokens,
    steps_per_epoch,
    stream_steps,
)
from tailora.train.loss import CAUSAL_LM, Task
from tailora.train.preference import KTO, Pairs


def example(number: int) -> Example:
    ids = np.full(2 + number % 5, number, dtype=np.int32)
    return replace(Example.of_text(ids), source_index=number)


DATA = Examples.of(example(number) for number in range(23))


def numbers(step: Step) -> list[list[int]]:
    counted = step.micro_batches[: len(step.micro_batches) - step.idle]
    return [[int(example.input_ids[0]) for example in part] for part in counted]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_epoch_sees_every_example_once_over_all_ranks(world: int) -> None:
    shapes = [StepShape(batch_size=2, accumulation=2, rank=rank, world=world) for rank in range(world)]
    count = steps_per_epoch(len(DATA), shapes[0])
    for epoch in range(2):
        seen = [
            number
            for shape in shapes
            for step in islice(dataset_steps(DATA, shape), epoch * count, (epoch + 1) * count)
            for batch in numbers(step)
            for number in batch
        ]
        assert sorted(seen) == list(range(23))


MIXED = replace(DATA, mixture=Mixture((10, 13), (1.5, 0.5)))


@pytest.mark.parametrize("world", [1, 2])
def test_two_epochs_of_a_mixture_see_its_sources_as_often_as_they_weigh(world: int) -> None:
    shapes = [StepShape(batch_size=2, accumulation=2, rank=rank, world=world) for rank in range(world)]
    count = steps_per_epoch(MIXED.epoch_size, shapes[0])
    steps = [step for shape in shapes for step in islice(dataset_steps(MIXED, shape), 2 * count)]
    seen = np.bincount([number for step in steps for batch in numbers(step) for number in batch], minlength=23)
    assert seen[:10].tolist() == [3] * 10
    assert sorted(seen[10:]) == [0] + [1] * 12  # round(13 / 2) = 6 in an epoch


@pytest.mark.parametrize(("data", "steps", "seen"), [(DATA, 2, 8), (DATA, 90, 23), (MIXED, 6, 16), (MIXED, 90, 23)])
def test_the_examples_of_a_run_are_those_of_its_steps(data: Examples, steps: int, seen: int) -> None:
    shape = StepShape(batch_size=2, accumulation=2)
    read = TrainingData(ONE_PASS, None, None, partial(dataset_steps, data, shape), steps, data, shape)
    trained_on = {int(example.input_ids[0]) for example in read.trained_on()}
    assert trained_on == {n for step in islice(read.steps(0), steps) for part in numbers(step) for n in part}
    assert len(trained_on) == seen


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_take_part_in_every_forward(world: int) -> None:
    ranks = [islice(dataset_steps(DATA, StepShape(4, 2, rank=rank, world=world)), 6) for rank in range(world)]
    for steps in zip(*ranks, strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        sizes = [2 + number % 5 for step in steps for part in numbers(step) for number in part]
        assert {(step.tokens, step.supervised) for step in steps} == {(sum(sizes), sum(sizes) - len(sizes))}


@pytest.mark.parametrize("start", [5, 6, 13])
def test_steps_from_the_middle_are_those_of_the_whole(start: int) -> None:
    shape = StepShape(batch_size=2, accumulation=2, seed=3)
    for data in (DATA, MIXED):
        whole = [numbers(step) for step in islice(dataset_steps(data, shape), 15)]
        assert [numbers(step) for step in islice(dataset_steps(data, shape, start), 15 - start)] == whole[start:]
    read = lambda: iter(DATA)  # noqa: E731
    whole = [numbers(step) for step in islice(stream_steps(read, shape), 15)]
    assert [numbers(step) for step in islice(stream_steps(read, shape, start), 15 - start)] == whole[start:]


def test_epochs_differ_and_seeds_differ() -> None:
    count = steps_per_epoch(len(DATA), StepShape(2, 1))
    orders = [
        [numbers(step) for step in islice(dataset_steps(DATA, StepShape(2, 1, seed)), 2 * count)] for seed in (0, 1)
    ]
    assert orders[0][:count] != orders[0][count:]
    assert orders[0] != orders[1]


def test_ranks_that_resume_a_stream_go_on_where_all_of_them_were() -> None:
    for rank, start in product(range(3), range(5)):
        shape = StepShape(2, 2, rank=rank, world=3)  # 12 examples in a step
        whole, resumed = (islice(stream_steps(lambda: iter(DATA), shape, first), 6 - first) for first in (0, start))
        assert list(map(numbers, resumed)) == list(map(numbers, whole))[start:]


def test_an_empty_stream_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(DataError, match="no example"):
        next(stream_steps(lambda: iter([]), StepShape(2, 1)))


@pytest.mark.parametrize("limit", [1, 10, 17, 1000, None])
def test_parts_keep_to_the_limit_and_lose_nothing(limit: int | None) -> None:
    lengths = [3, 9, 4, 4, 12, 5, 5, 5]
    cut = split_by_tokens(lengths, limit)
    assert [place for places in cut for place in places] == list(range(len(lengths)))
    assert all(len(places) == 1 or limit is None or sum(lengths[place] for place in places) <= limit for places in cut)


def test_parts_are_of_about_one_size() -> None:
    assert split_by_tokens([200] * 8, 1024) == [range(4), range(4, 8)]
    assert split_by_tokens([500, 400, 500, 200], 1000) == [range(2), range(2, 4)]  # not 500, 900 and 200


def test_ranks_with_fewer_forwards_repeat_one_that_is_not_counted() -> None:
    lengths = [9, 9, 9, 2]  # a forward of one rank has one example, or both
    examples = Examples.of(Example.of_text(np.full(length, i, np.int32)) for i, length in enumerate(lengths))
    shapes = [StepShape(2, 1, rank=rank, world=2, token_limit=12) for rank in range(2)]
    steps = [next(stream_steps(lambda: iter(examples), shape)) for shape in shapes]
    assert [len(step.micro_batches) for step in steps] == [2, 2]
    assert [step.idle for step in steps] == [0, 1]
    assert [numbers(step) for step in steps] == [[[0], [1]], [[2, 3]]]


def test_the_largest_forward_is_the_one_with_the_most_tokens() -> None:
    shape = StepShape(2, 1)
    batches = epoch_batches(DATA, shape, 0)
    largest = largest_forward(DATA, shape)
    tokens = sum(len(example.input_ids) for example in largest)
    assert tokens == max(int(DATA.lengths[batch].sum()) for batch in batches) > min(map(int, DATA.lengths))


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_in_parts_holds_the_same_examples(world: int) -> None:
    for rank in range(world):
        whole, cut = (
            islice(dataset_steps(DATA, StepShape(4, 2, rank=rank, world=world, token_limit=limit)), 6)
            for limit in (None, 8)
        )
        for one, other in zip(whole, cut, strict=True):
            assert sorted(chain(*numbers(one))) == sorted(chain(*numbers(other)))
            assert all(sum(len(example.input_ids) for example in part) <= 8 for part in other.micro_batches)


@pytest.mark.parametrize(
    ("task", "is_mixed"),
    [
        (CAUSAL_LM, False),
        (Pairs("dpo", 0.1), False),
        (KTO(0.1), True),
        (label_task(Labels("sequence-classification", ("a", "b"))), True),
    ],
)
def test_batches_of_labels_do_not_hold_one_length_alone(task: Task, is_mixed: bool) -> None:
    """Where the length tells of the label, a step would see one class alone."""
    ids = [np.zeros(length, np.int32) for length in (4, 40) for _ in range(64)]
    examples = Examples.of(Example.of_text(row) for row in ids)
    batches = epoch_batches(examples, StepShape(batch_size=8, accumulation=1, task=task), epoch=0)
    lengths = [{len(examples[int(i)].input_ids) for i in batch} for batch in batches]
    assert any(len(of_batch) == 2 for of_batch in lengths) == is_mixed


# ---- Batches of an epoch

LENGTHS = np.random.default_rng(0).integers(4, 200, size=1003)


def test_batches_hold_similar_lengths_in_random_order() -> None:
    batches = plan_batches(LENGTHS, batch_size=8, seed=0, epoch=0)
    padded = sum(LENGTHS[batch].max() * len(batch) for batch in batches)
    assert padded / LENGTHS.sum() < 1.1
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3
