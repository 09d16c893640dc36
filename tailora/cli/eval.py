"""`tailora eval`: evaluates an adapter and its base model on held-out data and checks quality gates."""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from pydantic import TypeAdapter

from tailora.cli.flags import Json, NprocPerNode, flags_of, log_columns, merge_with_run
from tailora.cli.main import ARGUMENTS, GATE_NOT_MET, log, note, print_json, print_text, stderr, stdout
from tailora.cli.models import (
    BaseModel,
    Device,
    Loaded,
    Quantize,
    base_model_name,
    check_sources,
    find_adapter,
    labels_of,
    load_model,
    refuse_system,
)
from tailora.errors import ConfigError
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
from tailora.formats.run_folder import check_report_kind, trained_rows, write_report
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.train.config import TrainConfig
from tailora.train.launch import count_processes, is_launched_by_tailora, launch, world_size

if TYPE_CHECKING:
    from tailora.data.labels import Labels
    from tailora.evaluation.scores import Scores


FLAGS = ["field", "system", "max_length", "dtype", "image_folder"]
Flags: Any = flags_of(TrainConfig, FLAGS)
KIND = "eval"  # of report.json
MEMORY_ADVICE = "try a smaller --max-length, --quantize nf4 or --dtype bfloat16, or close other programs"

Adapter = Annotated[str | None, Parameter(help="folder of an adapter or of its training run")]
Data = Annotated[str | None, Parameter(help="held-out data: JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")]
Gates = Annotated[
    list[str] | None,
    Parameter(
        negative=(),
        metavar="METRIC<N",
        help=f"exit with code 4 if this condition is not met; repeatable; {QUOTES_HINT}",
    ),
]
Metrics = Annotated[
    list[str] | None,
    Parameter(
        negative=(),
        metavar="A,B",
        help=f"{', '.join(METRICS)}; default: accuracy for data with choices, loss for other data, and all metrics for "
        "models that predict labels",
    ),
]
Normalize = Annotated[
    str,
    Parameter(
        metavar="A,B",
        help="what exact_match ignores: case, punctuation, space, strip (leading and trailing whitespace), or none",
    ),
]


@Parameter(name="*", group=Group.create_ordered("lm-evaluation-harness"))
@dataclass(frozen=True, kw_only=True)
class HarnessFlags:
    """Flags with the names that lm_eval uses."""

    tasks: Annotated[
        list[str] | None, Parameter(negative=(), metavar="A,B", help="tasks to run, such as hellaswag,arc_easy")
    ] = None
    include_path: Annotated[Path | None, Parameter(help="folder with your own tasks")] = None
    num_fewshot: Annotated[NonNegativeInt | None, Parameter(help="few-shot examples before each question")] = None
    apply_chat_template: Annotated[
        bool, Parameter(negative=(), show_default=False, help="format questions with the chat template")
    ] = False
    batch_size: Annotated[PositiveInt, Parameter(help="questions per forward pass")] = 8

    @property
    def names(self) -> list[str]:
        return [name for text in self.tasks or () for name in text.split(",") if name]


NO_HARNESS_FLAGS = HarnessFlags()


@dataclass(frozen=True)
class EvalTarget:
    model: str
    adapter: str | None  # the argument
    folder: Path | None  # of the adapter

    @property
    def trained_rows(self) -> set[bytes] | None:
        return trained_rows(self.folder or Path(self.model))


def eval(
    adapter: Adapter = None,
    /,
    *,
    data: Data = None,
    model: BaseModel = None,
    metrics: Metrics = None,
    gate: Gates = None,
    base: Annotated[bool, Parameter(help="also evaluate the base model, for comparison")] = True,
    normalize: Normalize = "strip",
    max_new_tokens: Annotated[PositiveInt, Parameter(help="maximum tokens per answer, for exact_match")] = 128,
    samples: Annotated[NonNegativeInt, Parameter(help="number of answers to show, for exact_match")] = 3,
    limit: Annotated[PositiveInt | None, Parameter(help="evaluate only the first N examples")] = None,
    quantize: Quantize = None,
    device: Device = "auto",
    harness: HarnessFlags = NO_HARNESS_FLAGS,
    output_dir: Annotated[Path | None, Parameter(help="folder for report.json and report.html")] = None,
    json: Json = False,
    nproc_per_node: NprocPerNode = None,
    flags: Flags = None,
) -> int:
    """Evaluate an adapter and its base model on held-out data.

    Without an adapter, only --model is evaluated. --nproc-per-node or torchrun splits the examples across processes.
    """
    started = time.monotonic()
    gates, metric_names = parse_gates(gate or []), parse_metrics(metrics or [])
    data_gates = [gate for gate in gates if not (harness.names and gate.is_on_task)]
    if data is None and (data_gates or not harness.names):
        if data_gates:
            raise ConfigError(
                f"--gate {data_gates[0]} needs held-out data; add --data FILE, or set a gate on TASK/METRIC "
                "and run --tasks TASK"
            )
        raise ConfigError("nothing to evaluate on; use --data FILE, or --tasks TASK (lm-evaluation-harness)")
    check_sources(data=[data])
    target = find_target(adapter, model)
    base = base and target.folder is not None
    named = [gate.metric.removesuffix(CHANGE) for gate in data_gates]
    of_classes = [name for name in named if OF_CLASS.fullmatch(name)]
    check_gates(data_gates, [*METRICS, *LABEL_METRICS, *of_classes], base=base)
    check_report_kind(output_dir, KIND)
    config = merge_with_run(flags, target.folder, arguments={"model": target.model})

    to_start = 0 if nproc_per_node is None or is_launched_by_tailora() else count_processes(nproc_per_node, device)
    if harness.names and max(to_start, world_size()) > 1:
        raise ConfigError(
            "--tasks only supports a single process; start without --nproc-per-node or torchrun, or remove --tasks to "
            "evaluate on --data only"
        )
    if to_start > 1:
        log(f"starting {to_start} processes")
        return launch(ARGUMENTS.get(), to_start, results=[GATE_NOT_MET])

    log("loading the model and data")
    folders = {} if target.folder is None else {"default": target.folder}
    labels = labels_of(target.model, list(folders.values()))
    refuse_system(labels, flags)
    if labels is not None:
        if data is None or harness.names:
            raise ConfigError(f"--tasks does not support {labels.task}; use --data with labeled rows instead")
        if nproc_per_node is not None or world_size() > 1:
            raise ConfigError(
                "a model that predicts labels is only evaluated in a single process; start without --nproc-per-node "
                "or torchrun"
            )
        log_columns(flags, config)
        loaded = load_model(target.model, folders, quantize=quantize, dtype=config.dtype, device=device, labels=labels)
        scores = _label_scores(target, loaded, labels, data, config, limit, base, metric_names, data_gates)
        return _finish(target, scores, gates, time.monotonic() - started, output_dir, json)
    check_gates(data_gates, list(METRICS), base=base)
    if wrong := [name for name in metric_names if name not in METRICS]:
        raise ConfigError(
            f"--metrics {','.join(wrong)} only applies to models that predict labels, not to this language model; use "
            f"{', '.join(METRICS)}"
        )
    from tailora.cli.progress import counter
    from tailora.evaluation.lm_eval import evaluate_tasks, find_tasks
    from tailora.evaluation.scores import EvalOptions, Scores, normalizer, score, without_adapter
    from tailora.train.failures import ignore_signals
    from tailora.train.memory import explain_out_of_memory
    from tailora.train.parallel import first_of_ranks
    from tailora.train.setup import launched_ranks

    options = EvalOptions(
        metrics=tuple(metric_names),
        extra_metrics=tuple(gate.metric for gate in gates if not gate.is_on_task),
        max_length=config.max_length,
        max_new_tokens=max_new_tokens,
        normalize=() if normalize == "none" else tuple(normalize.split(",")),
        limit=limit,
        samples=samples,
        image_folder=config.image_folder,
    )
    normalizer(options.normalize)
    tasks = find_tasks(harness.names, harness.include_path) if harness.names else None
    if tasks is not None:
        check_gates(gates, [*(METRICS if data else ()), *tasks.metrics], base=base)
    scores = Scores({}, {} if base else None, {} if base else None)
    with explain_out_of_memory("evaluating", MEMORY_ADVICE), launched_ranks(device) as ranks:
        chosen = device if ranks is None else str(ranks.device)
        loaded = load_model(target.model, folders, quantize=quantize, dtype=config.dtype, device=chosen)
        adapted = loaded.model if loaded.adapters else without_adapter(loaded.model)
        if data is not None:
            log_columns(flags, config)
            shown = ranks is None or ranks.is_main_process
            with counter(stderr(), "rows") if shown else nullcontext(lambda *_: None) as progress:
                reading: Any = {"field": config.field, "system": config.system, "base": base, "ranks": ranks}
                reading["trained_rows"] = target.trained_rows
                more = score(adapted, loaded.tokenizer, data, options, log=note, progress=progress, **reading)
            scores = scores.merge(more)
        if tasks is not None:
            asked: Any = {"batch_size": harness.batch_size, "num_fewshot": harness.num_fewshot, "limit": limit}
            asked["apply_chat_template"] = harness.apply_chat_template
            scores = scores.merge(evaluate_tasks(adapted, loaded.tokenizer, tasks, base=base, **asked))
        code = None
        if ranks is None or ranks.is_main_process:
            code = _finish(target, scores, gates, time.monotonic() - started, output_dir, json)
            sys.stdout.flush()
        if ranks is not None:  # launchers send SIGTERM as soon as one process has ended with this code
            ignore_signals()
        return first_of_ranks(code) or 0


def _label_scores(
    target: EvalTarget,
    loaded: Loaded,
    labels: "Labels",
    data: str,
    config: TrainConfig,
    limit: int | None,
    base: bool,
    chosen: Sequence[str],
    gates: Sequence[Gate],
) -> "Scores":
    """Returns all scores, or those that are chosen or needed by gates. A base with a new head is not evaluated."""
    from tailora.cli.progress import counter
    from tailora.evaluation.classification import evaluate_labels
    from tailora.evaluation.scores import without_adapter
    from tailora.train.memory import explain_out_of_memory
    from tailora.train.model_loading import labels_of_config, read_config

    if base and labels_of_config(read_config(target.model)) != labels:
        if changes := [str(gate) for gate in gates if gate.metric.endswith(CHANGE)]:
            raise ConfigError(
                f"--gate {', '.join(changes)}: the base model {target.model} has no head for these labels, so "
                "there is nothing to compare; use a gate without _change"
            )
        note(f"the base model {target.model} has no head for these labels, so only the adapter is evaluated")
        base = False
    of_gates = [gate.metric.removesuffix(CHANGE) for gate in gates]
    model = loaded.model if loaded.adapters else without_adapter(loaded.model)
    with explain_out_of_memory("evaluating", MEMORY_ADVICE), counter(stderr(), "rows") as progress:
        scores = evaluate_labels(
            model,
            loaded.tokenizer,
            labels,
            data,
            field=config.field,
            max_length=config.max_length,
            limit=limit,
            base=base,
            progress=progress,
            trained_rows=target.trained_rows,
        )
    if missing := [name for name in (*chosen, *of_gates) if name not in scores.metrics]:
        raise ConfigError(
            f"unknown score {', '.join(missing)} for {labels.task} on this data; available: {', '.join(scores.metrics)}"
        )
    return scores.only([*chosen, *of_gates]) if chosen else scores


def find_target(adapter: str | None, model: str | None) -> EvalTarget:
    """Returns what to evaluate. Raises ConfigError or FormatError."""
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


def _finish(
    target: EvalTarget, scores: "Scores", gates: Sequence[Gate], seconds: float, folder: Path | None, as_json: bool
) -> int:
    """Writes the report, prints the scores, and returns the exit code."""
    from tailora.report.pages.eval import EvalReport, eval_page

    values = [(gate, scores.values()[gate.metric]) for gate in gates]
    outcomes = [
        {"gate": str(gate), "value": value if math.isfinite(value) else None, "met": gate.is_met(value)}
        for gate, value in values
    ]
    names = {"model": target.model, "adapter": target.adapter}
    payload = {**names, **scores.to_dict(), "gates": outcomes, "seconds": seconds}
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
