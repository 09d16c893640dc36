"""The same looks at an adapter within its model: beside the base's weights, and on data."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tailora.core.compress import spectra_of
from tailora.errors import ConfigError
from tailora.evaluation.forgetting import forgetting, own_texts, texts_of
from tailora.evaluation.held_out import held_out
from tailora.evaluation.spectral import updates_of
from tailora.model import LoRAModel
from tailora.study.advice import advise
from tailora.study.inspect import NAME, Asked, Inspection, Progress, Say, examined
from tailora.study.model_layout import grouped, layers_of
from tailora.study.pair import overlaps, together
from tailora.study.strengths import forgets_much
from tailora.study.tails import Measure, dialled, tails
from tailora.train.config import TrainConfig
from tailora.train.load import load_base

OTHER = "other"


def loaded(
    folder: Path,
    other: Path | None,
    model: str,
    asked: Asked,
    quantize: str | None,
    say: Say,
    progress: Progress,
) -> Inspection:
    """Of adapters' folders within a base that is loaded for them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(
        model, "stored" if asked.data is asked.forgetting_data is None else "auto", device, quantize
    )
    adapted = LoRAModel.from_pretrained(base, folder, NAME)
    if other is not None:
        adapted.load_adapter(other, OTHER)
    adapted.to(device).eval()
    beside = None if other is None else OTHER
    found = inspect_model(adapted, NAME, asked, other=beside, tokenizer=tokenizer, say=say, progress=progress)
    return found if found.pair is None else replace(found, pair=replace(found.pair, other=str(other)))


def inspect_model(
    model: LoRAModel,
    name: str = NAME,
    asked: Asked | None = None,
    *,
    other: str | None = None,
    tokenizer: Any = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """An adapter of a model in memory, which is left as it is. other: another one of its adapters, to be
    compared with. tokenizer: where `asked` has data.

    Raises AdapterError, ConfigError, DataError.
    """
    started = time.perf_counter()
    asked = asked or Asked()
    on_data = asked.data is not None or asked.forgetting_data is not None
    if on_data and tokenizer is None:
        raise ConfigError(f"{asked.data or asked.forgetting_data} needs the model's tokenizer: give tokenizer")
    adapter = model.adapter(name)
    updates, left_out = updates_of(adapter, model.base_model)
    config = getattr(model.base_model, "config", None)
    weights = [parameter.dtype for parameter in model.base_model.parameters() if parameter.is_floating_point()]
    found = Inspection(
        adapter=name,
        model=getattr(config, "name_or_path", None),
        named_base=None,
        base_dtype=str(weights[0]).removeprefix("torch.") if weights else None,
        config=adapter.config.model_dump(),
        training={},
        layers=getattr(config, "num_hidden_layers", None) or layers_of(updates),
        modules=examined(updates, asked, progress),
        left_out=left_out,
        pair=None if other is None else overlaps(other, updates, updates_of(model.adapter(other), model.base_model)[0]),
    )
    if on_data:
        active = model.active_adapters
        model.set_adapter(name)
        try:
            found = _measured(found, model, name, asked, tokenizer, say)
        finally:
            model.set_adapter(active)
    return replace(found, advice=advise(found), seconds=time.perf_counter() - started)


def _measured(found: Inspection, model: LoRAModel, name: str, asked: Asked, tokenizer: Any, say: Say) -> Inspection:
    """With what takes data: losses, forgetting, and what a rule asks for."""
    measure = None if asked.data is None else _judge(found, model, asked, tokenizer, say)
    if measure is not None:
        found = _with_losses(found, model, name, str(asked.data), measure, say)
    texts, where = _texts(model, tokenizer, asked)
    lost = forgetting(model, texts)
    say(f"KL from the base on {where} {lost.kl:.4f}")
    found = replace(found, forgetting={**asdict(lost), "text": where})
    return replace(found, dial=dialled(model, name, texts, measure, say)) if forgets_much(found) else found


def _judge(found: Inspection, model: LoRAModel, asked: Asked, tokenizer: Any, say: Say) -> Measure:
    settings = {"model": found.model or NAME, "data": asked.data, "field": asked.field, "max_length": asked.max_length}
    return held_out(TrainConfig(**settings), model, tokenizer, say)


def _with_losses(found: Inspection, model: LoRAModel, name: str, data: str, measure: Measure, say: Say) -> Inspection:
    adapter = model.adapter(name)
    whole = {module.path: adapter.low_rank[module.path] for module in found.modules}
    spectra = spectra_of(replace(adapter, low_rank=whole))
    found = replace(
        found, held_out=tails(model, name, spectra, grouped(list(spectra), found.layers), data, measure, say)
    )
    if found.pair is None:
        return found
    both = together(model, (name, found.pair.other), measure)
    say(f"with {found.pair.other} alone {both.other:.4f}, with both {both.both:.4f}")
    return replace(found, pair=replace(found.pair, losses=both))


def _texts(model: LoRAModel, tokenizer: Any, asked: Asked) -> tuple[list[list[int]], str]:
    if asked.forgetting_data is not None:
        return texts_of(asked.forgetting_data, model, tokenizer), asked.forgetting_data
    return own_texts(model, tokenizer, seed=asked.seed), "text that the base writes"
