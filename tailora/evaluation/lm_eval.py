"""Tasks of lm-evaluation-harness, run by its own package (the extra `eval`) on the model with its adapter.

The adapter works inside the base model's layers, so the harness gets the base model and evaluates its active adapters.
`find_tasks` checks the tasks before a model is loaded; `evaluate_tasks` runs them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailora.core.inference import constant_adapters
from tailora.errors import ConfigError, DataError, listing, nearest, require_packages
from tailora.evaluation.scores import BASE, TUNED, Score, Scores, models_to_score
from tailora.evaluation.statistics import wilson_interval
from tailora.model import LoRAModel
from tailora.quiet import quiet_loggers
from tailora.train.significance import Z, change_of
from tailora.train.state import seeded

NO_FILTER = "none"
STDERR = "_stderr"
TASK_NAMES = "; use the name of an lm-evaluation-harness task, or pass the folder of its YAML file as --include-path"
LOGGERS = ("lm_eval", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.api.task", "lm_eval.tasks")


# ---- Before a model is loaded: do the tasks exist, and can their data be read?


@dataclass(frozen=True, slots=True)
class Tasks:
    names: tuple[str, ...]
    manager: Any  # lm_eval's TaskManager
    metrics: tuple[str, ...]  # TASK/METRIC, as in gates


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Returns the tasks of these names. include_path: a folder with the user's own tasks.

    Raises ConfigError without the extra `eval` and for unknown names, DataError for data that cannot be read.
    """
    require_packages("lm_eval", extra="eval")
    with quiet_loggers(*LOGGERS):  # their warnings are about the harness's own command line
        from datasets.exceptions import DatasetsError

        manager = _task_manager(names, include_path)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            problems = [
                f"--tasks: unknown task {name!r}{nearest(name, manager.all_tasks) or TASK_NAMES}" for name in unknown
            ]
            raise ConfigError(listing(problems))
        try:
            loaded = manager.load(list(names))
        except (DatasetsError, ImportError, OSError, ValueError) as error:
            cause = str(error).strip().partition("\n")[0]
            remedy = "If data is missing, run this once with network access; if a package is missing, install it"
            raise DataError(f"--tasks {','.join(names)}: cannot load the tasks: {cause}. {remedy}") from None
    metrics = [
        f"{name}/{_metric_name(metric, task_filter['name'])}"
        for name, task in loaded["tasks"].items()
        for metric in task.aggregation()
        for task_filter in getattr(task.config, "filter_list", None) or [{"name": NO_FILTER}]
    ]
    groups = [f"{group}/{metric.partition('/')[2]}" for group in loaded["groups"] for metric in metrics]
    return Tasks(tuple(names), manager, tuple(dict.fromkeys([*metrics, *groups])))


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Only lists lm_eval's own 14,000 tasks, which takes seconds, if `include_path` lacks a task."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path} is not a folder; use a folder with the tasks' YAML files")
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=str(include_path))


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == NO_FILTER else f"{metric}/{filter_name}"


# ---- Evaluation


@dataclass(frozen=True, slots=True)
class _TaskMetric:
    value: float
    error: float  # standard error; NaN if the harness gives none
    documents: tuple[float, ...]  # the value of every document, if the metric is their mean
    n: int

    def score(self) -> Score:
        if self.documents and set(self.documents) <= {0.0, 1.0}:
            return Score(*wilson_interval(self.documents), self.n)
        return Score(self.value, self.value - Z * self.error, self.value + Z * self.error, self.n)

    def change_from(self, base: "_TaskMetric") -> Score:
        """Returns the change, with an interval if documents can be paired."""
        if not self.documents or len(self.documents) != len(base.documents):
            return Score(self.value - base.value, math.nan, math.nan, self.n)
        return Score(*change_of(base.documents, self.documents).interval, self.n)


def evaluate_tasks(
    model: LoRAModel, tokenizer: Any, tasks: Tasks, *, base: bool = True, batch_size: int = 8, **options: Any
) -> Scores:
    """Evaluates the active adapters on the tasks, and with `base` also the model without them, paired by document.

    options: of lm_eval, by its names: num_fewshot, apply_chat_template, limit.
    Metrics are called TASK/METRIC, or TASK/METRIC/FILTER if the task has filters.
    """
    metrics, output, options = {}, {}, {**options, "log_samples": True}
    for name, activated in models_to_score(model, base).items():
        with quiet_loggers(*LOGGERS), seeded(0), activated(), constant_adapters(model.base_model):
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            harness = HFLM(pretrained=model.base_model, tokenizer=tokenizer, batch_size=batch_size)
            output = simple_evaluate(harness, tasks=list(tasks.names), task_manager=tasks.manager, **options)
        metrics[name] = dict(_task_metrics(output))
    tuned, before = metrics[TUNED], metrics.get(BASE)
    versions, shots = dict(output["versions"]), dict(output["n-shot"])
    return Scores(
        metrics={name: metric.score() for name, metric in tuned.items()},
        base=None if before is None else {name: metric.score() for name, metric in before.items()},
        change=None if before is None else {name: metric.change_from(before[name]) for name, metric in tuned.items()},
        tasks={"lm_eval": output["lm_eval_version"], "versions": versions, "shots": shots},
    )


def _task_metrics(output: Mapping[str, Any]) -> Iterator[tuple[str, _TaskMetric]]:
    """Reads the harness's results: task -> "METRIC,FILTER" -> number, and the documents of every task."""
    for task, numbers in output["results"].items():
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith(STDERR) or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}{STDERR},{filter_name}")
            error = float(error) if isinstance(error, int | float) else math.nan
            documents = tuple(_documents(output["samples"].get(task, ()), metric, filter_name, float(value)))
            size = numbers.get("sample_len") or len(documents)
            yield f"{task}/{_metric_name(metric, filter_name)}", _TaskMetric(float(value), error, documents, size)


def _documents(samples: Iterable[Mapping[str, Any]], metric: str, filter_name: str, value: float) -> list[float]:
    """Returns the metric of every document, or [] if `value` is not their mean."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
    numbers = [float(number) for number in values if isinstance(number, int | float)]
    is_complete = numbers and len(numbers) == len(values)
    return numbers if is_complete and math.isclose(np.mean(numbers), value, rel_tol=1e-6) else []
