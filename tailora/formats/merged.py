"""A merged model as a Hugging Face folder: config, generation config, safetensors, tokenizer, chat template.

The base stays as it is. Merged weights go to a file as they are computed, and transformers reads them from there, so
that a second copy of the model is never in memory.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tailora.core.dequantize import Change, Exchange, common_dtype, whole_plain
from tailora.core.layer_types import host_path
from tailora.core.merge import MergeReport, folded, moved_in, settle_ties
from tailora.core.quantization import is_quantized
from tailora.errors import FormatError, MergeError
from tailora.formats.low_rank_export import Source, refuse

SHARD = "2GB"  # of a file
SPILL = ".merged"
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def problems(source: Source) -> list[str]:
    base: Any = source.base_model
    found = []
    if not hasattr(base, "save_pretrained"):
        found.append(f"a {type(base).__name__} is no transformers model; merge_and_unload() it and save its state dict")
    return found


def write(folder: Path, source: Source) -> list[str]:
    """Fill `folder`; returns what differs from the base with the adapter beside it, in words. Raises FormatError."""
    base: Any = source.base_model
    spill = folder / SPILL
    changes, report = _merged(source, spill)
    untied = settle_ties(base, changes, untie_weights=True)
    with _made(changes), _tie_setting(base, untied):
        base.save_pretrained(folder, max_shard_size=SHARD)
    _write_theta(folder / "config.json")
    del changes
    spill.unlink(missing_ok=True)
    kept = _named(common_dtype(base))
    notes = [f"rounding to {kept} changes the update by at most {report.worst:.2g} of its size in a layer"]
    if again := sorted(report.quantization_error.values()):
        notes.append(
            f"the base is dequantised as a whole, to {kept}: what quantising had rounded off stays lost. Quantising "
            f"the merged weights again would err by {again[0]:.2g} to {again[-1]:.2g} times the update"
        )
    if source.tokenizer is None:
        notes.append("no tokenizer was given, so none is in the folder")
    else:
        source.tokenizer.save_pretrained(folder)
    return notes + (["tied weights are untied: tie_word_embeddings is false"] if untied else [])


def _merged(source: Source, spill: Path) -> tuple[list[Change], MergeReport]:
    """What takes the place of the base's tensors, on the disk, and what it loses."""
    base, low_rank = source.base_model, {**source.adapter.low_rank, **source.adapter.extras}
    others, total, problems = common_dtype(base), MergeReport({}), []
    found: list[Change] = []
    hosts = {path: host_path(base, path) for path in low_rank}
    for host in dict.fromkeys(hosts.values()):
        parts = [layer for path, layer in low_rank.items() if hosts[path] == host]
        try:
            changes, report = folded({host: (base.get_submodule(host), parts)}, others)
        except MergeError as error:
            problems.append(str(error))
            continue
        found += _all_spilled(changes, spill)
        total.rounding_error.update(report.rounding_error)
        total.quantization_error.update(report.quantization_error)
    refuse("merging", problems)
    layers = [base.get_submodule(host) for host in dict.fromkeys(hosts.values())]
    if any(is_quantized(layer) for layer in layers):
        found += _all_spilled(whole_plain(base, layers, others), spill)
    made: dict[int, nn.Parameter] = {}
    for path, trained in source.adapter.saved.items():
        found += moved_in(base.get_submodule(path), trained, made)
    return found, total


def _all_spilled(changes: Iterable[Change], spill: Path) -> Iterator[Change]:
    for each in changes:
        yield Exchange(each.module, each.name, _spilled(each.tensor, spill)) if isinstance(each, Exchange) else each


@contextmanager
def _made(changes: Iterable[Change]) -> Iterator[None]:
    """Within the block the base is the merged one; afterwards it has its own objects again."""
    made: list[Change] = []
    try:
        made += (change.make() for change in changes)
        yield
    finally:
        for change in reversed(made):
            change.make()


def _spilled(tensor: Tensor, file: Path) -> Tensor:
    """The same numbers at the end of `file`, in pages that the system drops from memory when it needs room."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    start = file.stat().st_size if file.exists() else 0
    with file.open("ab") as out:
        out.write(raw.numpy().data)
    mapped = torch.from_numpy(np.memmap(file, np.uint8, "c", start, raw.shape))
    return nn.Parameter(mapped.view(tensor.dtype).view(tensor.shape), requires_grad=False)


@contextmanager
def _tie_setting(base: Any, untied: bool) -> Iterator[None]:
    """What the saved config says of tied weights; the model's own is put back."""
    own = getattr(base.config, "tie_word_embeddings", False)
    if untied:
        base.config.tie_word_embeddings = False
    try:
        yield
    finally:
        if untied:
            base.config.tie_word_embeddings = own


def _write_theta(file: Path) -> None:
    """`rope_theta` where transformers 4 and mlx-lm look for it; they take 10,000 in silence where it is not."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    theta = (settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in settings:
        file.write_text(json.dumps({**settings, "rope_theta": theta}, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, source: Source) -> nn.Module:
    """The folder as transformers loads it. Raises FormatError where weights or the chat template are missing."""
    from transformers import AutoTokenizer

    base: Any = source.base_model
    settings = {"dtype": base.dtype, "attn_implementation": base.config._attn_implementation}
    model, report = type(base).from_pretrained(folder, output_loading_info=True, use_safetensors=True, **settings)
    wrong = [f"{kind}: {', '.join(sorted(report[kind])[:3])}" for kind in KEYS if report[kind]]
    if source.tokenizer is not None:
        template = AutoTokenizer.from_pretrained(folder).chat_template
        wrong += ["the chat template did not survive"] if template != source.tokenizer.chat_template else []
    if wrong:
        raise FormatError(f"the merged model does not load as it was saved: {'; '.join(wrong)}")
    loaded: nn.Module = model.to(base.device)
    return loaded


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
