"""The model card of an adapter on the Hub: what a run measured, how it was trained and how to use it.

The words are in formats/model_card.md.j2. Here are the values for it.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailora.formats.hub import DEMO, model_card, repository_of
from tailora.formats.io import read_own_json
from tailora.formats.offline import read_offline
from tailora.formats.run_folder import ADAPTER, REPORT
from tailora.report.format import NONE, interval, printable, setting, value_range
from tailora.report.pages.train import Metric, TrainReport
from tailora.train.config import NATS_PER_TOKEN

TRAINING = (  # settings of a run that the card shows, in this order
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "optim", "weight_decay", "loraplus_lr_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_length", "loss", "beta"),
    *("quantize", "seed"),
)
DATA = {  # of run.json -> what the card calls it; never a name of a file, or what is in it
    "rows": "rows",
    "train": "examples to train on",
    "eval": "held-out examples",
    "tokens": "tokens",
    "supervised_tokens": "learned tokens",
    "longest": "longest example, in tokens",
    "shape": "form of the rows",
    "task": "task",
}
PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
}


def run_card(
    repo_id: str, adapter: Path, settings: Mapping[str, Any], license_name: str | None, *, samples: bool
) -> str:
    """Returns the card of the adapter in a folder, with the results of its run if it is in the folder of a run.

    settings: of adapter_config.json, with the public name of the base.
    samples: show the answers before and after training to held-out prompts.
    Raises FormatError if the report of the run is damaged.
    """
    updates, path = read_offline(adapter).updates, adapter.resolve().parent / REPORT
    about = (
        f"LoRA adapter: {len(updates)} layers of rank {value_range([float(update.r) for update in updates.values()])}"
    )
    parts: dict[str, Any] = {}
    if adapter.resolve().name == ADAPTER and path.is_file():
        about += ", trained with tailora"
        parts = of_run(read_own_json(path, TrainReport, "delete it, or train again"), samples=samples)
    title, use = repo_id.rpartition("/")[2], how_to_use(repo_id, settings)
    return model_card(settings, f"{about}.", license_name, title=title, use=use, **parts)


def of_run(report: TrainReport, *, samples: bool) -> dict[str, Any]:
    """Returns the results, the data, the settings and the versions of a run."""
    data, result = report.run.get("data") or {}, report.result
    training = {name: report.settings.get(name) for name in TRAINING}
    if result is not None:
        training |= {"steps": result.steps, "step that is kept": result.best_step}
    training["dtype"] = report.run.get("dtype")
    answers = [[" ".join(printable(text).split()) for text in row] for row in report.answers]
    return {
        "verdict": report.verdict,
        "results": results(report),
        "data": {words: shown(data[name]) for name, words in DATA.items() if data.get(name) is not None},
        "more_settings": {name: setting(value) for name, value in training.items() if value is not None},
        "answers": answers if samples else [],
        "versions": ", ".join(f"{name} {version}" for name, version in (report.run.get("versions") or {}).items()),
    }


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else setting(value)


def results(report: TrainReport) -> list[list[str]]:
    """Returns the rows of the table: name, before, interval, after, interval."""
    result, measured = report.result, list(report.metrics)
    if result is not None and result.eval_loss_before is not None and result.eval_loss_after is not None:
        name = f"held-out loss, {report.run.get('loss_unit', NATS_PER_TOKEN)}"
        before, after = result.eval_loss_before, result.eval_loss_after
        measured.insert(0, Metric(name, before, result.eval_loss_before_95, after, result.eval_loss_after_95))

    def number(value: float | None) -> str:
        return NONE if value is None else f"{value:.3f}"

    return [
        [m.name, number(m.before), interval(m.before_95) or NONE, number(m.after), interval(m.after_95) or NONE]
        for m in measured
    ]


def how_to_use(repo_id: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how PEFT and tailora load it. A base model that is no repository of the Hub is BASE."""
    base, task = str(settings.get("base_model_name_or_path") or ""), settings.get("task_type")
    public = repository_of(base) or "BASE"
    ours = DEMO if base == DEMO else public  # tailora has the weights of the training, which the Hub has not
    base_flag = ["--model", "BASE"] if ours == "BASE" else []
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        files = ["--data", "ROWS.jsonl", "--output", "PREDICTIONS.jsonl"]
        commands = [["predict", repo_id, *base_flag, *files]]
    else:
        commands = [
            ["chat", "--adapter", repo_id, *base_flag],
            ["serve", "--model", ours, "--adapter", f"{repo_id.rpartition('/')[2]}={repo_id}"],
            ["export", repo_id, *base_flag, "--to", "vllm", "--output", "FOLDER"],
        ]
    return {
        "repo_id": repo_id,
        "peft_class": PEFT_CLASSES.get(str(task)) if public == base else None,
        "commands": [shlex.join(["tailora", *words]) for words in commands],
    }
