"""The frozen layers below the first adapted one: their states are the same in every epoch, so they are computed once.

While a run lasts, the decoder's layers are relays (a class swap, undone afterwards) on one course:

    plain      every layer computes
    filling    layers up to `depth` compute, the rest hand their input on; the states above layer `depth` are noted
    given      layers below `depth` hand their input on, the last of them hands out the states given; the rest compute

The embedding and what the model makes of positions and masks are computed as ever. The states of a document depend on
it alone, but for rounding: products of other sizes sum in another order. So each document is always computed in one and
the same company, its pack (the batches of the first epoch, those of evaluation), and the run's numbers do not depend on
what of the cache is there, or whether it is.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tailora.core.attach import Swapped, derived
from tailora.data.dataset import Example
from tailora.kernels.store import Store


@dataclass(eq=False)
class Course:
    """Where the states go, at the moment; shared by all relays of a model."""

    depth: int  # layers of the prefix
    width: int | None  # of the tuple that a layer returns; None: the states themselves
    given: Tensor | None = None  # (batch, length, hidden)
    filling: bool = False
    reached: list[Tensor] = field(default_factory=list)  # the states above the prefix, in filling

    def as_output(self, states: Tensor) -> Any:
        return states if self.width is None else (states, *[None] * (self.width - 1))


class Relay(Swapped):
    """A decoder layer that computes, hands its input on, or hands out what is given, as the course has it."""

    course: Course
    place: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        course = self.course
        below = self.place < course.depth
        if (course.given is not None and below) or (course.filling and not below):
            last = self.place == course.depth - 1
            own = args[0] if args else kwargs["hidden_states"]
            return course.as_output(course.given if last and course.given is not None else own)
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if course.filling and self.place == course.depth - 1:
            course.reached.append(states_of(output))
        return output


def states_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def relayed(layers: Sequence[nn.Module], course: Course) -> Iterator[None]:
    """Within the block the layers, in the order of their calls, are relays on this course."""
    for place, layer in enumerate(layers):
        layer.__class__ = derived(Relay, type(layer))
        layer.__dict__.update(course=course, place=place)
    try:
        yield
    finally:
        for layer in layers:
            cast(Any, layer).__class__ = cast(Any, layer).plain
            del layer.__dict__["course"], layer.__dict__["place"]


@contextmanager
def filling(course: Course) -> Iterator[list[Tensor]]:
    """Within the block the prefix alone is computed; yields the list that its states come into."""
    course.filling, course.reached = True, []
    try:
        yield course.reached
    finally:
        course.filling, course.reached = False, []


@contextmanager
def given(course: Course, states: Tensor | None) -> Iterator[None]:
    """Within the block the model goes on from these states, (batch, length, hidden); from its input for None."""
    course.given = states
    try:
        yield
    finally:
        course.given = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The documents whose states are kept, by number, and the company in which each is computed."""

    packs: list[list[Example]]
    numbers: dict[bytes, int]  # of the document that `name_of` names
    places: list[tuple[int, int]]  # number -> pack, place within

    @classmethod
    def of(cls, packs: list[list[Example]]) -> "Plan":
        """A document that is in several packs belongs to the first."""
        numbers: dict[bytes, int] = {}
        places: list[tuple[int, int]] = []
        for i, pack in enumerate(packs):
            for j, example in enumerate(pack):
                if (name := name_of(example)) not in numbers:
                    numbers[name] = len(places)
                    places.append((i, j))
        return cls(packs, numbers, places)

    @property
    def tokens(self) -> int:
        return sum(len(self.packs[i][j].input_ids) for i, j in self.places)


def name_of(example: Example) -> bytes:
    return hashlib.sha256(example.input_ids.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Prefix:
    """Gives the states of documents above the frozen layers: kept ones, or computed and then kept."""

    layers: list[nn.Module]  # of the whole decoder, in order
    course: Course
    plan: Plan
    store: Store
    compute: Callable[[Sequence[Example]], list[Tensor]]  # states of each, (tokens, hidden), on the course's filling
    like: Tensor  # 0 elements: dtype and hidden size of the states, on the CPU
    device: torch.device

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within the block the model's layers are relays, and the store is open."""
        try:
            with relayed(self.layers, self.course):
                yield
        finally:
            self.store.close()

    @contextmanager
    def start(self, examples: Sequence[Example], packed: bool) -> Iterator[None]:
        """Within the block the model, called with these examples in one batch, starts above the prefix."""
        states = self.states(examples)
        laid = None
        if states is not None:
            laid = torch.cat(states)[None] if packed else pad_sequence(states, batch_first=True)
        with given(self.course, laid):
            yield

    def states(self, examples: Sequence[Example]) -> list[Tensor] | None:
        """Of every example, (tokens, hidden); None where the plan has none of them.

        Those that are not planned are computed together.
        """
        numbers = [self.plan.numbers.get(name_of(example)) for example in examples]
        strangers = [example for example, number in zip(examples, numbers, strict=True) if number is None]
        if len(strangers) == len(examples):
            return None
        computed = iter(self.compute(strangers) if strangers else [])
        known = self._planned([number for number in numbers if number is not None])
        return [next(computed) if number is None else known[number] for number in numbers]

    def _planned(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        if any(number not in self.store for number in numbers):
            self.store.refresh()
        found: dict[int, Tensor] = {}
        for number in numbers:
            if number not in found:
                states = self.kept(number)
                found |= self.pack_of(number) if states is None else {number: states.to(self.device)}
        return found

    def kept(self, number: int) -> Tensor | None:
        """From the store, on the CPU; None where it has nothing sound."""
        i, j = self.plan.places[number]
        states = self.like.new_empty(len(self.plan.packs[i][j].input_ids), self.like.shape[-1])
        return states if self.store.read(number, states) else None

    def pack_of(self, number: int) -> dict[int, Tensor]:
        """Computed together with its company, and kept: the states of all that belong to its pack."""
        i, _ = self.plan.places[number]
        pack = self.plan.packs[i]
        found: dict[int, Tensor] = {}
        for j, (example, states) in enumerate(zip(pack, self.compute(pack), strict=True)):
            own = self.plan.numbers[name_of(example)]
            if self.plan.places[own] == (i, j):
                self.store.write(own, states.cpu().contiguous())
                found[own] = states
        return found
