"""An adapter to anywhere: write, read back, compare with the live model, and only then give the folder its name.

peft       the folder that tailora, PEFT and most of the ecosystem read
portable   the same for servers that pass over half of its settings (vLLM, SGLang, LMDeploy): portable.py
gguf       llama.cpp and Ollama: gguf.py
mlx        mlx-lm: mlx.py
merged     a Hugging Face folder without an adapter: merged.py
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, by_host
from tailora.core.attach import Swapped, attach, evaluating
from tailora.core.dequantize import Change, as_linear, common_dtype
from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, host_of, host_path
from tailora.core.quantization import quantized_layers
from tailora.errors import ConfigError, FormatError, nearest
from tailora.formats import gguf, merged, mlx
from tailora.formats.fingerprint import fingerprint
from tailora.formats.io import replace_folder, to_bytes, writing
from tailora.formats.load import restore
from tailora.formats.low_rank_export import Source, factors, hosts, limits, padded, refuse, scale_notes
from tailora.formats.metadata import KEY, Notes
from tailora.formats.peft import (
    CARD,
    EMBEDDING_SUFFIXES,
    PREFIX,
    SETTINGS,
    SUFFIXES,
    WEIGHTS,
    StoredAdapter,
    read_adapter,
    unknown_to_peft,
    write_adapter,
)
from tailora.formats.peft_config import to_peft
from tailora.formats.peft_paths import stems

# ---- Whether a file computes what the live model computes: its logits, read back, against the model's.
#
# In float32, whatever the weights are in: a bfloat16 forward of the demo's model is 3% (text) to 8% (random tokens) off
# its float32 one, and one of 4 bits on a CPU rounds more, which would hide what a file has wrong. A layer's weights are
# wide while it runs, and no longer; a quantised one is a plain one with the dequantised weight while its parent runs.


TOLERANCE = 1e-4  # of the logits' size: float32 sums in another order
ROWS, LENGTH = 2, 16


@dataclass(frozen=True)
class Comparison:
    """Root mean squares over all logits of a small batch, as shares of the live model's.

    difference: between the file and the live model.    effect: between the live model and its base.
    """

    difference: float
    effect: float
    tolerance: float

    def check(self, what: str, remedy: str) -> None:
        """Raises FormatError above the tolerance, and for what is not a number."""
        if not self.difference <= self.tolerance:
            raise FormatError(
                f"{what}: read back, its logits differ from the live model's by {self.difference:.2g} of their size; "
                f"allowed is {self.tolerance:.2g}, and the adapter's own effect is {self.effect:.2g}. Nothing was "
                f"written; {remedy}"
            )


def compare(live: Tensor, base: Tensor, again: Tensor, *, rounded: bool) -> Comparison:
    """Three times the logits of one batch. Raises FormatError for logits that are not finite.

    rounded: the update was added to weights of 16 bits; half of its effect may go.
    """
    size = _rms(live)
    if not 0 < size < math.inf:
        raise FormatError(f"the live model's logits have a size of {size}: there is nothing to compare with")
    effect = _rms(live - base) / size
    return Comparison(_rms(again - live) / size, effect, max(TOLERANCE, effect / 2 if rounded else 0))


def probe(base_model: Any) -> Tensor:
    """(rows, length) ids from all over the vocabulary. Raises FormatError for a model that takes no ids."""
    vocabulary = getattr(getattr(base_model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise FormatError(
            f"{type(base_model).__name__} has no config.vocab_size, so there is nothing to compare it with after "
            "export; save_adapter and merge work for every module"
        )
    ids = torch.arange(1, ROWS * LENGTH + 1) * 7919 % vocabulary  # a prime: no pattern
    return ids.view(ROWS, LENGTH).to(next(base_model.parameters()).device)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, length, vocabulary), float32, in evaluation; modes and weights of all modules are put back."""
    with evaluating(model), widened(model):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Every module's own parameters are float32 while it runs, and its quantised children plain layers of float32."""
    handles = []
    packed = {id(layer) for layer in quantized_layers(model).values()}
    for module in model.modules():
        narrow = {name: each for name, each in module._parameters.items() if each is not None}
        if id(module) in packed:
            del narrow["weight"]
        if any(each.dtype != torch.float32 for each in narrow.values()):
            handles.append(module.register_forward_pre_hook(partial(_widen, narrow)))
            handles.append(module.register_forward_hook(partial(_narrow, narrow), always_call=True))
        if children := [child for child in module.children() if id(child) in packed]:
            undo: list[Change] = []
            handles.append(module.register_forward_pre_hook(partial(_unpack, children, undo)))
            handles.append(module.register_forward_hook(partial(_pack, undo), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(narrow: dict[str, nn.Parameter], module: nn.Module, _: Any) -> None:
    module._parameters.update({name: nn.Parameter(each.float(), False) for name, each in narrow.items()})


def _narrow(narrow: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
    module._parameters.update(narrow)


def _unpack(children: list[nn.Module], undo: list[Change], *_: Any) -> None:
    for child in children:
        undo += [change.make() for change in as_linear(child)]


def _pack(undo: list[Change], *_: Any) -> None:
    while undo:
        undo.pop().make()


@contextmanager
def only(base_model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """The base with this adapter and no other within the block; its layers must be those of an adapter it has."""
    before = {module: vars(module)["active_adapters"] for module in base_model.modules() if isinstance(module, Swapped)}
    parts = adapter.parts if adapter else {}
    try:
        for module in before:
            attach(module, ())
        hosts = {path: host_path(base_model, path) for path in parts}
        for host, each in by_host(hosts, {path: (part,) for path, part in parts.items()}).items():
            attach(base_model.get_submodule(host), each)
        with evaluating(nn.ModuleList(parts.values())):
            yield base_model
    finally:
        for module, active in before.items():
            attach(module, active)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


# ---- A PEFT folder that servers read right: one rank that vLLM allows, alpha = r, nothing that one of them passes
# over.
#
# vLLM knows no rank or alpha patterns, SGLang and LMDeploy no rsLoRA; here the scale is 1 and lives in B.


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank
CARD_TEXT = """\
---
library_name: peft
{base}tags:
- lora
- tailora
---

Plain LoRA adapter of {layers} layers, r = alpha = {r}: the scale is in B.
For PEFT, and for servers that read r and alpha alone: vLLM, SGLang, LMDeploy.
"""


def problems(source: Source) -> list[str]:
    found = limits(source, (LINEAR, CONV1D, EMBEDDING))
    return found or _rank_problems(source)


def _rank_problems(source: Source) -> list[str]:
    plain = factors(source)
    highest = max(each.r for each in plain.values())
    if highest > RANKS[-1]:
        return [f"rank {highest} is above {RANKS[-1]}, the highest that vLLM takes; export to 'gguf' or 'merged'"]
    r = next(rank for rank in RANKS if rank >= highest)
    narrow = [path for path, each in plain.items() if min(each.A.shape[1], each.B.shape[0]) < r]
    why = f"the one rank for all layers, {r}, is above its width; export to 'gguf' or 'merged'"
    return [f"{path}: {why}" for path in narrow]


def write(folder: Path, source: Source) -> list[str]:
    """Fill `folder`; returns what differs from the adapter as trained, in words."""
    plain = factors(source)
    highest = max(each.r for each in plain.values())
    r = next(rank for rank in RANKS if rank >= highest)
    tensors: dict[str, Tensor] = {}
    layer_types = hosts(source)
    for path, each in plain.items():
        keys, wide = EMBEDDING_SUFFIXES if layer_types[path] is EMBEDDING else SUFFIXES, padded(each, r)
        tensors |= {f"{PREFIX}{path}{keys['A']}": wide.A, f"{PREFIX}{path}{keys['B']}": wide.B}
    places = {path: (host_of(source.base_model, path), "weight") for path in plain}
    notes = Notes(base=fingerprint(places))
    config = source.adapter.config.replaced(
        r=r,
        lora_alpha=r,
        lora_dropout=0,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights="kaiming",
    )
    settings = to_peft(config, stems(source.base_model, source.adapter.low_rank).values(), source.base_model)
    base = settings["base_model_name_or_path"]
    (folder / WEIGHTS).write_bytes(to_bytes(tensors, {"format": "pt", KEY: notes.model_dump_json()}))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    card = CARD_TEXT.format(base=f"base_model: {base}\n" if base else "", layers=len(plain), r=r)
    (folder / CARD).write_text(card, encoding="utf-8")
    below = sum(each.r < r for each in plain.values())
    padding = [f"{below} of {len(plain)} layers are filled up with zeros to rank {r}"] if below else []
    return [*scale_notes(source), *padding]


# ----


Again = Callable[[Path, Source], AbstractContextManager[nn.Module]]
WIDER = "merge into a base in float32 (--dtype float32), or take a format that keeps the adapter apart"


@dataclass(frozen=True)
class Format:
    """problems: what it cannot hold.    write: fills a folder, says what it changed.
    again: the model that the folder gives, within the block.
    """

    problems: Callable[[Source], list[str]]
    write: Callable[[Path, Source], list[str]]
    again: Again


@dataclass(frozen=True)
class Exported:
    """files: name -> bytes.    changes: what differs from the adapter as trained, in words."""

    folder: Path
    format: str
    files: dict[str, int]
    changes: list[str]
    logits: Comparison

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def export(source: Source, folder: Path, to: str) -> Exported:
    """Write a new `folder` whole or not at all; what it gives when read back was compared with the live model.

    Raises ConfigError for an unknown format or a folder with something in it, FormatError with all that the format
    cannot hold and for a difference above the tolerance, MergeError, WriteError.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format is called {to!r}{nearest(to, FORMATS)}; there are: {', '.join(FORMATS)}")
    check_new(folder)
    chosen = FORMATS[to]
    refuse(f"{to} cannot hold this adapter", chosen.problems(source))
    ids = probe(source.base_model)
    with only(source.base_model, source.adapter) as model:
        live = logits(model, ids)
    with only(source.base_model, None) as model:
        base = logits(model, ids)
    with replace_folder(folder) as fresh:
        changes = chosen.write(fresh, source)
        with chosen.again(fresh, source) as model:
            again = logits(model, ids)
        rounded = to == "merged" and common_dtype(source.base_model).itemsize == 2
        found = compare(live, base, again, rounded=rounded)
        found.check(f"{folder} ({to})", WIDER if rounded else "please report it")
        files = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
    return Exported(folder, to, files, changes, found)


def check_new(folder: Path) -> None:
    """Raises ConfigError for what would be lost, WriteError for a path that cannot be looked at."""
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; give another folder, or delete it")


def _peft_problems(source: Source) -> list[str]:
    dialled = [path for path, layer in source.adapter.low_rank.items() if float(layer.strength) != 1]
    remedy = "set_scale(name, 1), or export to 'portable', which holds it"
    problems = [f"the strength dial of {len(dialled)} layers is not 1; {remedy}"] if dialled else []
    if unknown := unknown_to_peft(source.adapter):
        problems.append(
            f"PEFT has no use_dora on attention and parameters: {', '.join(unknown[:3])} ({len(unknown)} in all); "
            "save_adapter keeps it for tailora, and 'merged' holds it"
        )
    return problems


def _write_peft(folder: Path, source: Source) -> list[str]:
    write_adapter(folder, source.adapter, source.base_model)
    learned = any(layer.learns_scaling for layer in source.adapter.low_rank.values())
    return ["learned scales are multiplied into B; the metadata keeps them for tailora"] if learned else []


def _beside(read: Callable[[Path, Source], StoredAdapter]) -> Again:
    """For a folder that holds an adapter: the base with what was read from it."""

    def again(folder: Path, source: Source) -> AbstractContextManager[nn.Module]:
        return only(source.base_model, restore(read(folder, source), source.base_model))

    return again


_read_peft = _beside(lambda folder, _: read_adapter(folder))
FORMATS = {
    "peft": Format(_peft_problems, _write_peft, _read_peft),
    "portable": Format(problems, write, _read_peft),
    "gguf": Format(gguf.problems, gguf.write, _beside(lambda folder, source: gguf.read(folder, source.base_model))),
    "mlx": Format(mlx.problems, mlx.write, _beside(lambda folder, _: mlx.read(folder))),
    "merged": Format(merged.problems, merged.write, lambda folder, source: nullcontext(merged.load(folder, source))),
}
