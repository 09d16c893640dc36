"""What a rule is, and what it gives: advice that carries its numbers and a setting or command to copy."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailora.study.inspect import Inspection


@dataclass(frozen=True)
class Advice:
    """rule: its name.    says: a sentence or two.    evidence: the numbers, and the thresholds that they passed.
    setting: of LoRAConfig or TrainConfig, ready to be used.    command: to be copied, or "".
    """

    rule: str
    says: str
    evidence: dict[str, Any]
    setting: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Rule:
    """when, source: as docs/inspect.md has them."""

    name: str
    when: str
    source: str
    look: Callable[[Inspection], Iterable[Advice]]


def command(*words: str) -> str:
    return shlex.join(["tailora", *words])


def above(value: float, low: float | None) -> bool:
    """Whether it is above 0 for certain; where the spread is not known, whether it is at all."""
    return (value if low is None else low) > 0


def few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
