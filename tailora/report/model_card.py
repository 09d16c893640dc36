"""The model card of an adapter on the Hub: what a run measured, how it was trained and how to use it.

The text is in formats/model_card.md.j2; this file provides its values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailora.formats.hub import DEMO, model_card, repository_of
from tailora.formats.io import read_own_json
from tailora.formats.offline import read_offline
from tailora.formats.peft import about_zero_updates
from tailora.formats.run_folder import ADAPTER, REPORT, read_system_message
from tailora.report.format import NONE, interval, printable, setting, value_range
from tailora.report.pages.train import Metric, TrainReport
from tailora.train.config import NATS_PER_TOKEN

TRAINING = (  # settings of a run that the card shows, in this order
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "loraplus_lr_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_length", "loss", "beta"),
    *("quantize", "seed"),
)


def run_card(
    repo_id: str, adapter: Path, settings: Mapping[str, Any], license_name: str | None, *, samples: bool
) -> str:
    """Returns the card of an adapter, with the results of its run if the adapter is in the folder of a run.

    settings: of adapter_config.json, with the public name of the base.
    samples: show the answers before and after training to held-out prompts.
    Raises FormatError if the report of the run is damaged.
    """
    stored = read_offline(adapter)
    ranks = [float(update.r) for update in stored.updates.values()]
    about, path = f"LoRA adapter: {len(ranks)} layers of rank {value_range(ranks)}", adapter.resolve()
    parts: dict[str, Any] = {"system": read_system_message(adapter)}
    if path.name == ADAPTER and (path.parent / REPORT).is_file():
        about += ", trained with tailora"
        parts |= of_run(read_own_json(path.parent / REPORT, TrainReport, "delete it, or train again"), samples=samples)
    about = f"{about}. {about_zero_updates(stored.zero_updates)}".rstrip()
    base = str(settings.get("base_model_name_or_path") or "")
    public = repository_of(base) or "BASE"
    use = {
        "base": DEMO if base == DEMO else public,  # tailora has the weights used in training, the Hub does not
        "task": settings.get("task_type") if public == base else None,
        "predicts_labels": settings.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"),
    }
    return model_card(settings, about, license_name, repo_id=repo_id, use=use, **parts)


def of_run(report: TrainReport, *, samples: bool) -> dict[str, Any]:
    """Returns the results, data, settings and versions of a run."""
    result, metrics = report.result, list(report.metrics)
    training = {name: report.settings.get(name) for name in TRAINING}
    if result is not None:
        training |= {"steps": result.steps, "best step": result.best_step}
        name = f"held-out loss, {report.run.get('loss_unit', NATS_PER_TOKEN)}"
        before, after = result.eval_loss_before, result.eval_loss_after
        if before is not None and after is not None:
            metrics.insert(0, Metric(name, before, result.eval_loss_before_95, after, result.eval_loss_after_95))
    training["dtype"] = report.run.get("dtype")
    return {
        "verdict": report.verdict,
        "results": [
            [m.name, *_number_and_interval(m.before, m.before_95), *_number_and_interval(m.after, m.after_95)]
            for m in metrics
        ],
        "data": report.run.get("data") or {},
        "more_settings": {name: setting(value) for name, value in training.items() if value is not None},
        "answers": [[" ".join(printable(text).split()) for text in row] for row in report.answers if samples],
        "versions": report.run.get("versions") or {},
    }


def _number_and_interval(value: float | None, ends: tuple[float, float] | None) -> tuple[str, str]:
    return NONE if value is None else f"{value:.3f}", interval(ends) or NONE
