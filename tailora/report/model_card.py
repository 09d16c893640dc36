"""The model card of an adapter on the Hub: its YAML, and what a run measured, how it was trained and how to use it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from tailora.errors import FormatError
from tailora.formats.export import VLLM_RANKS
from tailora.formats.hub import (
    DEMO,
    OF_DEMO,
    PIPELINE_TAGS,
    is_written_by_tailora,
    repository_of,
    setting_rows,
    signed,
)
from tailora.formats.offline import OfflineAdapter
from tailora.formats.run_folder import ADAPTER, REPORT
from tailora.quiet import quiet_loggers
from tailora.report.format import NONE, interval, printable, setting, value_range
from tailora.report.pages.train import TrainReport
from tailora.train.config import NATS_PER_TOKEN

TAGS = ("lora", "tailora")
TRAINING = (  # settings of a run that the card tells, in this order
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "optim", "weight_decay", "loraplus_lr_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_length", "loss", "beta"),
    *("quantize", "seed"),
)
DATA = (  # of run.json -> what the card calls it; never a name of a file, or what is in it
    ("rows", "rows"),
    ("train", "examples to train on"),
    ("eval", "held-out examples"),
    ("tokens", "tokens"),
    ("supervised_tokens", "learned tokens"),
    ("longest", "longest example, in tokens"),
    ("shape", "form of the rows"),
    ("task", "task"),
)
LOSS = "held-out loss"
PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}


def read_report(adapter: Path) -> TrainReport | None:
    """Returns the report of the run that made the adapter in `adapter`; None if it is not in the folder of a run.

    Raises FormatError if it is damaged.
    """
    path = adapter.resolve().parent / REPORT
    if adapter.resolve().name != ADAPTER or not path.is_file():
        return None
    try:
        return TypeAdapter(TrainReport).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()})") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


# ---- The YAML


def completed_card(
    text: str | None, settings: Mapping[str, Any], body: str, license_name: str | None, *, replace: bool = False
) -> tuple[str, bool]:
    """Returns a card, and whether the words of `text` are kept in it.

    text: the card that there is; None without one. Its words are kept if they are not tailora's, unless `replace`.
    Its YAML is always kept, and completed; where tailora wrote the words, our values replace those of before.
    settings: of adapter_config.json. body: the words of a new card.
    Raises FormatError if the YAML of `text` cannot be read.
    """
    ours = card_data(settings, license_name)
    if text is None:
        return _joined(ours, signed(body)), False
    try:
        with quiet_loggers("huggingface_hub.repocard"):  # that warns of a card without YAML
            card = ModelCard(text)
    except (YAMLError, ValueError, TypeError) as error:
        raise FormatError(
            f"the YAML at the top of the model card cannot be read: {' '.join(str(error).split())}"
        ) from None
    theirs: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    is_kept = not is_written_by_tailora(card.text) and not replace
    tags = list(dict.fromkeys([*_listed(theirs.get("tags")), *TAGS]))
    merged = {**ours, **theirs} if is_kept else {**theirs, **ours}
    if license_name is not None:
        merged["license"] = license_name
    return _joined({**merged, "tags": tags}, card.text if is_kept else signed(body)), is_kept


def card_data(settings: Mapping[str, Any], license_name: str | None) -> dict[str, Any]:
    """Returns the YAML. The Hub refuses a base model that is no repository, so such a base is only in the words."""
    repository = repository_of(_base_name(settings))
    data = {
        "base_model": repository,
        "base_model_relation": None if repository is None else "adapter",
        "library_name": "peft",
        "license": license_name,
        "pipeline_tag": PIPELINE_TAGS.get(str(settings.get("task_type"))),
        "tags": list(TAGS),
    }
    return {name: value for name, value in data.items() if value is not None}


def _base_name(settings: Mapping[str, Any]) -> str:
    """Returns what others call the base model; "" if the settings name none."""
    return str(settings.get("base_model_name_or_path") or "")


def _listed(tags: Any) -> list[str]:
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags] if tags else [])]


def _joined(data: Mapping[str, Any], text: str) -> str:
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


# ---- The words


def card_body(
    repo_id: str,
    settings: Mapping[str, Any],
    updates: OfflineAdapter,
    report: TrainReport | None,
    *,
    samples: bool = False,
) -> str:
    """Returns the words of a card. samples: show the answers before and after training to held-out prompts."""
    ranks = value_range([float(update.r) for update in updates.updates.values()])
    base = _base_name(settings)
    made = "" if report is None else ", trained with tailora"
    of_base = f" for `{repository_of(base) or base}`{f' ({OF_DEMO})' if base == DEMO else ''}" if base else ""
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"LoRA adapter{of_base}: {len(updates.updates)} layers of rank {ranks}{made}.",
    ]
    if report is not None:
        parts += [report.verdict, *_results(report), *_data(report)]
    parts += ["## Settings", _table(("setting", "value"), [*setting_rows(settings).items(), *_training(report)])]
    if samples and report is not None and report.samples:
        parts += ["## Answers before and after", *(_answer(*row) for row in report.answers)]
    parts += ["## Use", *_use(repo_id, settings, updates)]
    if report is not None and (versions := report.run.get("versions")):
        parts += ["## Versions", ", ".join(f"{name} {version}" for name, version in versions.items())]
    return "\n\n".join(parts) + "\n"


def _results(report: TrainReport) -> list[str]:
    result, rows = report.result, []
    if result is None:
        return []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        unit = str(report.run.get("loss_unit", NATS_PER_TOKEN))
        before, after = result.eval_loss_before, result.eval_loss_after
        ends = [interval(ends) or NONE for ends in (result.eval_loss_before_95, result.eval_loss_after_95)]
        rows.append((f"{LOSS}, {unit}", f"{before:.3f}", ends[0], f"{after:.3f}", ends[1]))
    for metric in report.metrics:
        values = [NONE if value is None else f"{value:.3f}" for value in (metric.before, metric.after)]
        ends = [interval(ends) or NONE for ends in (metric.before_95, metric.after_95)]
        rows.append((metric.name, values[0], ends[0], values[1], ends[1]))
    if not rows:
        return []
    header = ("of held-out examples", "before", "95% interval", "after", "95% interval")
    return ["## Results", _table(header, rows)]


def loss_in_card(text: str) -> list[str]:
    """Returns the cells of the line on the held-out loss in a card that `card_body` wrote: its name, before, interval,
    after, interval. [] if there is none.
    """
    lines = (line for line in text.splitlines() if line.startswith(f"| {LOSS}"))
    cells = [cell.strip() for cell in next(lines, "").strip("| ").split(" | ")]
    return cells if len(cells) == 5 else []


def _data(report: TrainReport) -> list[str]:
    facts = report.run.get("data") or {}
    rows = [(words, setting(_counted(facts[name]))) for name, words in DATA if facts.get(name) is not None]
    return ["## Training data", "The data itself is not here.", _table(("", ""), rows)] if rows else []


def _counted(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _training(report: TrainReport | None) -> list[tuple[str, str]]:
    if report is None:
        return []
    rows = {name: report.settings.get(name) for name in TRAINING}
    if report.result is not None:
        rows |= {"steps": report.result.steps, "step that is kept": report.result.best_step}
    rows["dtype"] = report.run.get("dtype")
    return [(name, setting(value)) for name, value in rows.items() if value is not None]


def _answer(prompt: str, base: str, tuned: str) -> str:
    texts = (("prompt", prompt), ("base", base), ("adapter", tuned))
    return "\n".join(f"> **{who}:** {' '.join(printable(text).split())}  " for who, text in texts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _use(repo_id: str, settings: Mapping[str, Any], updates: OfflineAdapter) -> list[str]:
    """How PEFT, tailora and vLLM load it. A base model that is no repository of the Hub is BASE."""
    base, name = _base_name(settings), repo_id.rpartition("/")[2]
    public = repository_of(base) or "BASE"
    ours = DEMO if base == DEMO else public  # tailora has the weights of the training, which the Hub has not
    uses_text = settings.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS")
    words = ["chat", "--adapter", repo_id] if uses_text else ["predict", repo_id]
    words += ["--model", "BASE"] if ours == "BASE" else []
    words += [] if uses_text else ["--data", "ROWS.jsonl", "--output", "PREDICTIONS.jsonl"]
    commands = [shlex.join(["tailora", *words])]
    if uses_text:
        commands.append(shlex.join(["tailora", "serve", "--model", ours, "--adapter", f"{name}={repo_id}"]))
    load = PEFT_CLASSES.get(str(settings.get("task_type")))
    if load and public == base:
        lines = [f"from peft import {load}", "", f'model = {load}.from_pretrained("{repo_id}")']
    else:
        lines = ["from peft import PeftModel", "", f'model = PeftModel.from_pretrained(base_model, "{repo_id}")']
    parts = ["With PEFT:", _fenced("py", lines), "With tailora:", _fenced("sh", commands)]
    if not uses_text:
        return parts
    rank = max((update.factors.A.shape[1] for update in updates.updates.values()), default=0)
    if problems := vllm_problems(settings, rank):
        export = f"`tailora export {repo_id} --to vllm --output FOLDER`"
        return [*parts, f"vLLM does not read {', '.join(problems)}: {export} writes what it reads."]
    known_rank = min(known for known in VLLM_RANKS if known >= rank)
    start = ["vllm", "serve", public, "--enable-lora", "--max-lora-rank", str(known_rank)]
    return [*parts, "With vLLM:", _fenced("sh", [shlex.join([*start, "--lora-modules", f"{name}={repo_id}"])])]


def vllm_problems(settings: Mapping[str, Any], rank: int) -> list[str]:
    """Returns what of an adapter vLLM refuses, or ignores without saying so."""
    names = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    problems = [name for name in (*names, "target_parameters") if settings.get(name)]
    if settings.get("bias", "none") != "none":
        problems.append("bias")
    if rank > max(VLLM_RANKS):
        problems.append(f"ranks above {max(VLLM_RANKS)}")
    return problems


def _fenced(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
