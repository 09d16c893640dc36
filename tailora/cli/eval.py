"""`tailora eval`: evaluates an adapter and its base model on held-out data and checks quality gates."""

import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from pydantic import TypeAdapter

from tailora.cli.__main__ import run as run_program
from tailora.cli.flags import SWITCH, Json, NprocPerNode, flags_of, log_columns, merge_with_run
from tailora.cli.main import ARGUMENTS, log, note, print_json, print_text, stderr, stdout
from tailora.cli.models import (
    BaseModel,
    Device,
    Quantize,
    base_model_name,
    check_sources,
    find_adapter,
    labels_of,
    load_model,
    refuse_system,
)
from tailora.cli.train import start_judge
from tailora.errors import GATE_NOT_MET, ConfigError
from tailora.evaluation.metrics import (
    CHANGE,
    LABEL_METRICS,
    METRICS,
    OF_CLASS,
    QUOTES_HINT,
    Gate,
    check_gates,
    parse_gates,
    parse_metrics,
)
from tailora.formats.run_folder import RUN, check_report_kind, trained_rows, write_report
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.train.config import JUDGE, TrainConfig
from tailora.train.launch import count_processes, is_launched_by_tailora, launch, world_size
from tailora.train.rewards import BUILT_IN, Reward, RewardProcess, parse_rewards

if TYPE_CHECKING:
    from accelerate import PartialState

    from tailora.data.labels import Labels
    from tailora.evaluation.judge import Judge
    from tailora.evaluation.scores import EvalOptions, Scores
    from tailora.model import LoRAModel


FLAGS = ["field", "system", "max_length", "dtype", "image_folder", "judge_model", "judge_prompt"]
Flags: Any = flags_of(TrainConfig, FLAGS)
KIND = "eval"  # of report.json
MEMORY_ADVICE = "try a smaller --max-length, --quantize nf4 or --dtype bfloat16, or close other programs"
GATE_HELP = f"exit with code 4 if this condition is not met; repeatable; {QUOTES_HINT}"
METRIC_HELP = (
    f"scores greedy answers, as in train: a built-in metric, FILE.py:FUNCTION or judge:URL; or one of "
    f"{', '.join(METRICS)}; repeatable; default: accuracy for data with choices, all scores for labels, loss for other "
    "data"
)

Adapter = Annotated[str | None, Parameter(help="folder of an adapter or of its training run")]


@Parameter(name="*", group=Group.create_ordered("lm-evaluation-harness"))
@dataclass(frozen=True, kw_only=True)
class HarnessFlags:
    """Flags with the names that lm_eval uses."""

    tasks: Annotated[list[str] | None, Parameter(metavar="A,B", help="tasks, such as hellaswag,arc_easy")] = None
    include_path: Annotated[Path | None, Parameter(help="folder with your own tasks")] = None
    num_fewshot: Annotated[NonNegativeInt | None, Parameter(help="few-shot examples before each question")] = None
    apply_chat_template: Annotated[bool, SWITCH, Parameter(help="format questions with the chat template")] = False
    batch_size: Annotated[PositiveInt, Parameter(help="questions per forward pass")] = 8

    @property
    def names(self) -> list[str]:
        return [name for text in self.tasks or () for name in text.split(",") if name]


NO_HARNESS_FLAGS = HarnessFlags()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    data: Annotated[
        str | None, Parameter(help="held-out data: JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")
    ] = None
    model: BaseModel = None
    metric: Annotated[list[str] | None, Parameter(metavar="METRIC", help=METRIC_HELP)] = None
    gate: Annotated[list[str] | None, Parameter(metavar="METRIC<N", help=GATE_HELP)] = None
    base: Annotated[bool, Parameter(help="also evaluate the base model, for comparison")] = True
    max_new_tokens: Annotated[PositiveInt, Parameter(help="maximum tokens of an answer")] = 256
    samples: Annotated[NonNegativeInt, Parameter(help="number of answers to show")] = 3
    limit: Annotated[PositiveInt | None, Parameter(help="evaluate only the first N examples")] = None
    quantize: Quantize = None
    device: Device = "auto"
    output_dir: Annotated[Path | None, Parameter(help="folder for report.json and report.html")] = None
    json: Json = False
    nproc_per_node: NprocPerNode = None


NO_FLAGS = EvalFlags()


@dataclass(frozen=True)
class EvalTarget:
    model: str
    adapter: str | None  # the argument
    folder: Path | None  # of the adapter

    @property
    def folders(self) -> dict[str, Path]:
        return {} if self.folder is None else {"default": self.folder}

    @property
    def run(self) -> Path | None:
        """The folder of the run that wrote the adapter."""
        folder = None if self.folder is None else self.folder.resolve().parent
        return folder if folder is not None and (folder / RUN).exists() else None

    @property
    def trained_rows(self) -> set[bytes] | None:
        return trained_rows(self.folder or Path(self.model))


@dataclass(frozen=True)
class Evaluation:
    """A command line that has been checked."""

    target: EvalTarget
    given: EvalFlags
    harness: HarnessFlags
    config: TrainConfig  # for reading the data, as in the adapter's run
    gates: Sequence[Gate]
    metrics: Sequence[str]  # scores of the model
    answer_metrics: Sequence[Reward]
    base: bool  # also evaluate the base model
    judge: "Judge | None"  # the language model among the metrics of answers

    @property
    def gates_on_data(self) -> list[Gate]:
        return [gate for gate in self.gates if not (self.harness.names and gate.is_on_task)]

    def load(self, device: str, labels: "Labels | None" = None) -> tuple["LoRAModel", Any]:
        from tailora.evaluation.scores import without_adapter

        quantize, dtype = self.given.quantize, self.config.dtype
        folders = self.target.folders
        loaded = load_model(self.target.model, folders, quantize=quantize, dtype=dtype, device=device, labels=labels)
        return loaded.model if loaded.adapters else without_adapter(loaded.model), loaded.tokenizer


def eval(
    adapter: Adapter = None,
    /,
    *,
    given: EvalFlags = NO_FLAGS,
    harness: HarnessFlags = NO_HARNESS_FLAGS,
    flags: Flags = None,
) -> int:
    """Evaluate an adapter and its base model on held-out data.

    Without an adapter, only --model is evaluated. --nproc-per-node or torchrun splits the examples across processes.
    """
    started = time.monotonic()
    evaluation = checked(adapter, given, harness, flags)
    nproc = None if is_launched_by_tailora() else given.nproc_per_node
    to_start = 0 if nproc is None else count_processes(nproc, given.device)
    if harness.names and max(to_start, world_size()) > 1:
        raise ConfigError("--tasks only supports a single process; start without --nproc-per-node or torchrun")
    if to_start > 1:
        log(f"starting {to_start} processes")
        return launch(run_program, ARGUMENTS.get(), to_start, results=[GATE_NOT_MET])
    log("loading the model and data")
    if given.data is not None:
        log_columns(flags, evaluation.config)
    labels = labels_of(evaluation.target.model, list(evaluation.target.folders.values()))
    refuse_system(labels, flags)
    if labels is not None:
        return finish(evaluation, label_scores(evaluation, labels), started)
    return evaluate_language_model(evaluation, started)


def checked(
    adapter: str | None, given: EvalFlags, harness: HarnessFlags, flags: Mapping[str, Any] | None
) -> Evaluation:
    """Raises ConfigError, DataError or FormatError for what can be checked before loading torch."""
    metrics, sources = parse_metrics(given.metric or [], [*BUILT_IN, JUDGE])
    answer_metrics = parse_rewards([], sources)[1]
    gates = parse_gates(given.gate or [], [metric.name for metric in answer_metrics])
    on_data = [gate for gate in gates if not (harness.names and gate.is_on_task)]
    if given.data is None and on_data:
        raise ConfigError(f"--gate {on_data[0]} needs held-out data; add --data FILE, or set a gate on TASK/METRIC")
    if given.data is None and not harness.names:
        raise ConfigError("nothing to evaluate on; use --data FILE, or --tasks TASK (lm-evaluation-harness)")
    check_sources(data=[given.data])
    target = find_target(adapter, given.model)
    base = given.base and target.folder is not None
    named = [gate.metric.removesuffix(CHANGE) for gate in on_data]
    names = [*METRICS, *LABEL_METRICS, *filter(OF_CLASS.fullmatch, named), *(metric.name for metric in answer_metrics)]
    check_gates(on_data, names, base=base)
    check_report_kind(given.output_dir, KIND)
    config = merge_with_run(flags, target.folder, arguments={"model": target.model, "metric": sources})
    functions = [metric for metric in answer_metrics if not metric.is_judge]
    if functions:
        with RewardProcess(functions, config.reward_seconds):  # raises if one cannot be loaded
            pass
    judge = None if not config.judges else judge_of(config, given.output_dir or target.run, base=base)
    return Evaluation(target, given, harness, config, gates, metrics, answer_metrics, base, judge)


def judge_of(config: TrainConfig, folder: Path | None, *, base: bool) -> "Judge | None":
    """Returns the judge for the main process, after one request. folder: for its verdicts."""
    if not base:
        raise ConfigError("--metric judge:URL compares an adapter with its base model; use an ADAPTER, no --no-base")
    if folder is None:
        raise ConfigError("--metric judge:URL keeps verdicts in a file, and this adapter has no run; add --output-dir")
    return start_judge(config.replaced(output_dir=str(folder)))


def evaluate_language_model(evaluation: Evaluation, started: float) -> int:
    """Evaluates on the data and on the tasks of lm-evaluation-harness; returns the exit code."""
    from tailora.evaluation.lm_eval import evaluate_tasks, find_tasks
    from tailora.evaluation.scores import EvalOptions, Scores
    from tailora.train.failures import ignore_signals
    from tailora.train.memory import explain_out_of_memory
    from tailora.train.parallel import first_of_ranks
    from tailora.train.setup import launched_ranks

    given, harness, base = evaluation.given, evaluation.harness, evaluation.base
    names = [*METRICS, *(metric.name for metric in evaluation.answer_metrics)]
    check_gates(evaluation.gates_on_data, names, base=base)
    if wrong := [name for name in evaluation.metrics if name not in METRICS]:
        raise ConfigError(f"--metric {', '.join(wrong)} is for models that predict labels; use {', '.join(METRICS)}")
    options = EvalOptions(
        metrics=tuple(evaluation.metrics) if evaluation.metrics or evaluation.answer_metrics else None,
        answer_metrics=tuple(evaluation.answer_metrics),
        metric_seconds=evaluation.config.reward_seconds,
        extra_metrics=tuple(gate.metric for gate in evaluation.gates if not gate.is_on_task),
        max_length=evaluation.config.max_length,
        max_new_tokens=given.max_new_tokens,
        limit=given.limit,
        field=evaluation.config.field,
        system=evaluation.config.system,
        image_folder=evaluation.config.image_folder,
    )
    tasks = find_tasks(harness.names, harness.include_path) if harness.names else None
    if tasks is not None:
        check_gates(evaluation.gates, [*(names if given.data else ()), *tasks.metrics], base=base)
    scores = Scores({}, {} if base else None, {} if base else None)
    with explain_out_of_memory("evaluating", MEMORY_ADVICE), launched_ranks(given.device) as ranks:
        model, tokenizer = evaluation.load(given.device if ranks is None else str(ranks.device))
        if given.data is not None:
            scores = scores.merge(data_scores(evaluation, options, model, tokenizer, ranks))
        if tasks is not None:
            asked: Any = {"batch_size": harness.batch_size, "num_fewshot": harness.num_fewshot, "limit": given.limit}
            asked["apply_chat_template"] = harness.apply_chat_template
            scores = scores.merge(evaluate_tasks(model, tokenizer, tasks, base=base, **asked))
        code = None
        if ranks is None or ranks.is_main_process:
            code = finish(evaluation, scores, started)
            sys.stdout.flush()
        if ranks is not None:  # launchers send SIGTERM as soon as one process has ended with this code
            ignore_signals()
        return first_of_ranks(code) or 0


def data_scores(
    evaluation: Evaluation, options: "EvalOptions", model: "LoRAModel", tokenizer: Any, ranks: "PartialState | None"
) -> "Scores":
    from tailora.cli.progress import counter
    from tailora.evaluation.scores import score

    reading: Any = {"base": evaluation.base, "ranks": ranks, "trained_rows": evaluation.target.trained_rows}
    is_shown = ranks is None or ranks.is_main_process
    with counter(stderr(), "rows") if is_shown else nullcontext(lambda *_: None) as progress:
        if evaluation.judge is not None:
            reading["judge"] = partial(evaluation.judge.compare, progress=progress)
        return score(model, tokenizer, str(evaluation.given.data), options, log=note, progress=progress, **reading)


def label_scores(evaluation: Evaluation, labels: "Labels") -> "Scores":
    """Returns all scores, or those that are chosen or needed by gates. A base with a new head is not evaluated."""
    from tailora.cli.progress import counter
    from tailora.evaluation.classification import check_packages, evaluate_labels, score_names
    from tailora.train.memory import explain_out_of_memory
    from tailora.train.model_loading import labels_of_config, read_config

    target, given, gates = evaluation.target, evaluation.given, evaluation.gates_on_data
    if given.data is None or evaluation.harness.names:
        raise ConfigError(f"--tasks does not support {labels.task}; use --data with labeled rows instead")
    if given.nproc_per_node is not None or world_size() > 1:
        raise ConfigError("labels are only evaluated in a single process; start without --nproc-per-node or torchrun")
    base = evaluation.base and labels_of_config(read_config(target.model)) == labels
    if evaluation.base and not base:
        if changes := [str(gate) for gate in gates if gate.metric.endswith(CHANGE)]:
            raise ConfigError(
                f"--gate {', '.join(changes)}: the base model {target.model} has no head for these labels, so "
                "there is nothing to compare; use a gate without _change"
            )
        note(f"the base model {target.model} has no head for these labels, so only the adapter is evaluated")
    if evaluation.answer_metrics:
        names = ", ".join(metric.name for metric in evaluation.answer_metrics)
        raise ConfigError(f"--metric {names}: this model predicts labels, and has no answers to score; use its scores")
    needed = [*evaluation.metrics, *(gate.metric.removesuffix(CHANGE) for gate in gates)]
    check_packages()
    check_scores(needed, score_names(labels), labels.task)
    reading: Any = {"field": evaluation.config.field, "max_length": evaluation.config.max_length, "limit": given.limit}
    reading["trained_rows"] = target.trained_rows
    model, tokenizer = evaluation.load(given.device, labels)
    with explain_out_of_memory("evaluating", MEMORY_ADVICE), counter(stderr(), "rows") as progress:
        scores = evaluate_labels(model, tokenizer, labels, given.data, base=base, progress=progress, **reading)
    check_scores(needed, scores.metrics, f"{labels.task} on this data")
    return scores.only(needed) if evaluation.metrics else scores


def check_scores(needed: Sequence[str], available: Collection[str], what: str) -> None:
    """Raises ConfigError for a metric or a gate without a score."""
    if missing := [name for name in needed if name not in available]:
        raise ConfigError(f"unknown score {', '.join(missing)} for {what}; available: {', '.join(available)}")


def find_target(adapter: str | None, model: str | None) -> EvalTarget:
    if adapter is None:
        if model is None:
            raise ConfigError("no model; pass an ADAPTER, or use --model for a model without one")
        check_sources(model=model)
        return EvalTarget(model, None, None)
    path = Path(adapter)
    model_folder = next((folder for folder in (path, path / "model") if (folder / "config.json").is_file()), None)
    if model_folder is not None and not (path / "adapter_config.json").exists():
        if model is not None:
            raise ConfigError(f"{adapter} is a full model, not an adapter for {model}; evaluate one model at a time")
        return EvalTarget(str(model_folder), None, None)
    folder = find_adapter(adapter)
    return EvalTarget(base_model_name(model, [folder]), adapter, folder)


def finish(evaluation: Evaluation, scores: "Scores", started: float) -> int:
    """Writes the report, prints the scores, and returns the exit code."""
    from tailora.evaluation.answers import describe_metric
    from tailora.report.format import plural
    from tailora.report.pages.eval import EvalReport, eval_page

    folder, as_json = evaluation.given.output_dir, evaluation.given.json
    values = [(gate, scores.values()[gate.metric]) for gate in evaluation.gates]
    outcomes = [
        {"gate": str(gate), "value": value if math.isfinite(value) else None, "met": gate.is_met(value)}
        for gate, value in values
    ]
    names = {"model": evaluation.target.model, "adapter": evaluation.target.adapter}
    payload = {**names, **scores.to_dict(), "gates": outcomes, "seconds": time.monotonic() - started}
    payload["shown_answers"] = evaluation.given.samples
    payload |= {} if evaluation.judge is None else {"judge": dict(evaluation.judge.counts)}
    payload["findings"] = [
        describe_metric(name, change, plural(change.answers, "prompt")) for name, change in scores.changes.items()
    ]
    if folder is not None:
        write_report(folder, KIND, payload, allow_nan=False)
        log(write_page_if_possible(folder))
    report = TypeAdapter(EvalReport).validate_python(payload)
    if as_json:
        print_json(payload)
        if report.rows_of_training:
            note(report.rows_of_training)
    else:
        print_page(stdout(), eval_page(report))  # ends with the gates
    missed = [gate for gate in report.gates if not gate.met]
    for missed_gate in missed if as_json else ():
        print_text(stderr(), f"gate not met: {missed_gate}", "red")
    return GATE_NOT_MET if missed else 0
