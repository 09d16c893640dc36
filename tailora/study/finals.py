"""The runs that judge: several seeds of each finalist, shared by all processes of a search through their folders."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tailora.study.judging import Candidate
from tailora.study.trial import Trial

LOCK = "run.lock"
Run = Callable[[Candidate, int, Path], Trial]  # finalist, seed, folder -> what came out, made now or before


@dataclass(frozen=True)
class Final:
    candidate: Candidate
    seed: int
    folder: Path


def finals(chosen: Sequence[Candidate], seeds: Sequence[int], folder: Path, first: int) -> Iterator[list[Final]]:
    """In rounds that are worth having as a whole: the first few finalists by seed, then each other with its seeds."""
    for seed in seeds:
        yield [_final(each, seed, folder) for each in chosen[:first]]
    for each in chosen[first:]:
        yield [_final(each, seed, folder) for seed in seeds]


def _final(candidate: Candidate, seed: int, folder: Path) -> Final:
    return Final(candidate, seed, folder / "finals" / f"{candidate.number:04d}" / f"seed-{seed}")


def shared(round_of: Sequence[Final], run: Run) -> list[Trial]:
    """The runs of a round: those that nobody makes are made here, for the others it waits. In order."""
    for final in round_of:
        _made(final, run, wait=False)
    return [trial for final in round_of if (trial := _made(final, run, wait=True)) is not None]


def _made(final: Final, run: Run, *, wait: bool) -> Trial | None:
    final.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(final.folder / LOCK, timeout=-1 if wait else 0):
            return run(final.candidate, final.seed, final.folder)
    except Timeout:
        return None
