"""Tasks of lm-evaluation-harness, by its own package (the extra `eval`), on the live model with its adapter.

The adapter works within the base's layers, so the harness is given the base model and judges what is active in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from tailora.errors import ConfigError, DataError, listing, nearest, require_packages
from tailora.evaluation.scores import BASE, TUNED, Score, Scores
from tailora.evaluation.statistics import Interval, paired_difference, share_difference, wilson_interval
from tailora.model import LoRAModel
from tailora.quiet import quiet_loggers
from tailora.train.checkpoint import seeded

NO_FILTER = "none"
STDERR = "_stderr"
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class How:
    """As lm_eval's flags of these names."""

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    limit: int | None = None
    batch_size: int = 8


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that are there, and whose data could be read."""

    names: tuple[str, ...]
    manager: Any
    metrics: tuple[str, ...]  # TASK/METRIC, as gates name them


@dataclass(frozen=True, slots=True)
class _Found:
    """One metric of one task: what the harness says, and the value of every document where it is their mean."""

    value: float
    error: float  # standard error; NaN where the harness gives none
    documents: tuple[float, ...]
    n: int

    def score(self) -> Score:
        if self.documents and set(self.documents) <= {0.0, 1.0}:
            return Score(*wilson_interval(self.documents), self.n)
        return Score(self.value, self.value - Z * self.error, self.value + Z * self.error, self.n)

    def since(self, before: "_Found") -> Score:
        """The change, with an interval where documents can be paired."""
        if not self.documents or len(self.documents) != len(before.documents):
            return Score(self.value - before.value, math.nan, math.nan, self.n)
        if {*self.documents, *before.documents} <= {0.0, 1.0}:
            return Score(*share_difference(before.documents, self.documents), self.n)
        change: Interval = paired_difference(before.documents, self.documents, [1] * len(self.documents))
        return Score(*change, self.n)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Their names and data, checked before a model is loaded. include_path: a folder of tasks of the user's own.

    Raises ConfigError without the extra and for unknown names, DataError for data that cannot be read.
    """
    require_packages("lm_eval", extra="eval")
    with _harness():
        manager = _manager(names, include_path)
        known = manager.all_tasks
        if unknown := [name for name in names if name not in known]:
            problems = [f"--tasks: lm_eval has no task {name!r}{nearest(name, known)}" for name in unknown]
            raise ConfigError(listing(problems))
        loaded = _loaded(manager, names)
    metrics = [f"{task}/{name}" for task, each in loaded["tasks"].items() for name in _metrics_of(each)]
    groups = [f"{group}/{name.partition('/')[2]}" for group in loaded["groups"] for name in metrics]
    return Tasks(tuple(names), manager, tuple(dict.fromkeys([*metrics, *groups])))


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """What knows the tasks. To look through lm_eval's own, 14,000 of them, takes seconds, so only where it has to."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise ConfigError(f"--include-path {include_path} is not a folder")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _loaded(manager: Any, names: Sequence[str]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load(list(names))
    except (DatasetsError, OSError, ImportError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise DataError(
            f"--tasks {','.join(names)}: the tasks' data cannot be read: {cause}. "
            "lm_eval fetches it from the Hub, once, and reads it from the cache afterwards"
        ) from None


def _metrics_of(task: Any) -> Iterator[str]:
    filters = getattr(task.config, "filter_list", None) or [{"name": NO_FILTER}]
    for metric in task.aggregation():
        for each in filters:
            yield _name(metric, each["name"])


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == NO_FILTER else f"{metric}/{filtered}"


def judge_tasks(model: LoRAModel, tokenizer: Any, tasks: Tasks, how: How, *, base: bool = True) -> Scores:
    """The active adapters on these tasks, and with `base` the model without them, document by document beside it.

    Metrics are called TASK/METRIC, or TASK/METRIC/FILTER where the task has filters of its own.
    """
    sides: dict[str, Callable[[], AbstractContextManager[None]]] = {TUNED: nullcontext}
    if base and model.active_adapters:
        sides[BASE] = model.disable_adapter
    found, raw = {}, {}
    for side, become in sides.items():
        with become():
            raw = _run(model, tokenizer, tasks, how)
            found[side] = dict(_found(raw))
    tuned, plain = found[TUNED], found.get(BASE)
    return Scores(
        metrics={name: each.score() for name, each in tuned.items()},
        base=None if plain is None else {name: each.score() for name, each in plain.items()},
        change=None if plain is None else {name: each.since(plain[name]) for name, each in tuned.items()},
        tasks={"lm_eval": raw["lm_eval_version"], "versions": dict(raw["versions"]), "shots": dict(raw["n-shot"])},
    )


def _run(model: LoRAModel, tokenizer: Any, tasks: Tasks, how: How) -> Any:
    with _harness(), seeded(0):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        return simple_evaluate(
            HFLM(pretrained=model.base_model, tokenizer=tokenizer, batch_size=how.batch_size),
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            num_fewshot=how.num_fewshot,
            apply_chat_template=how.apply_chat_template,
            limit=how.limit,
            log_samples=True,
        )


@contextmanager
def _harness() -> Iterator[None]:
    """Its own words are for its own users: what matters of them is said by us."""
    with quiet_loggers(
        "lm_eval", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.api.task", "lm_eval.tasks"
    ):
        yield


def _found(raw: Mapping[str, Any]) -> Iterator[tuple[str, _Found]]:
    for task, numbers in raw["results"].items():
        for key, value in numbers.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith(STDERR) or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}{STDERR},{filtered}")
            documents = tuple(_documents(raw["samples"].get(task, ()), metric, filtered, float(value)))
            yield (
                f"{task}/{_name(metric, filtered)}",
                _Found(
                    float(value),
                    float(error) if isinstance(error, int | float) else math.nan,
                    documents,
                    numbers.get("sample_len") or len(documents),
                ),
            )


def _documents(samples: Iterable[Mapping[str, Any]], metric: str, filtered: str, value: float) -> list[float]:
    """The metric of every document; none where the task's number is something else than their mean."""
    found = [each.get(metric) for each in samples if each["filter"] == filtered]
    numbers = [float(each) for each in found if isinstance(each, int | float)]
    whole = len(numbers) == len(found) and bool(numbers) and math.isclose(float(np.mean(numbers)), value, rel_tol=1e-6)
    return numbers if whole or (numbers and value == 0 == np.mean(numbers)) else []
