"""Whether the states of the frozen lower layers are kept for this run: tried on the user's model, and said aloud."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

import tailora
from tailora.core.attach import evaluating
from tailora.core.quantization import held_parts
from tailora.data.dataset import Example, Examples
from tailora.data.demo import cache_folder
from tailora.kernels.prefix import Course, Plan, Prefix, filling, given, relayed, states_of
from tailora.kernels.store import Store, free_bytes, make_room
from tailora.train.config import TrainConfig
from tailora.train.dataloader import Feed
from tailora.train.kernel_choice import Kernels, documents, running
from tailora.train.loss import BatchLayout, as_batch, budgeted
from tailora.train.memory import size
from tailora.train.trainable import Trainable

LAYOUT = 1  # raised when kept states change their meaning
SHARE = 0.2  # of the free disk, unless a limit is set
GB = 10**9


@dataclass(frozen=True, eq=False)
class Kept:
    prefix: Prefix | None = None
    words: str = ""  # for the run's header
    fact: dict[str, int] | None = None  # what of it decides the bits of the training


@dataclass(frozen=True, eq=False)
class Batches:
    """Those that come again: of the training's first pass, where there is a second, and of evaluation."""

    train: list[list[Example]]
    held_out: list[list[Example]]


def choose_prefix(
    config: TrainConfig,
    model: Trainable,
    rows: BatchLayout,
    kernels: Kernels,
    feed: Feed,
    accelerator: Accelerator,
    note: Callable[[str], None],
    recorded: Mapping[str, Any] | None,
) -> Kept:
    """recorded: the facts of the run that goes on; it trains on kept states if it did before, and on as many."""
    if config.fast == "off" or config.prefix_cache_gb == 0:
        return Kept()
    batches = _batches(feed, rows, accelerator.num_processes)
    if recorded is not None:
        fact = recorded.get("prefix") or {"batches": 0}
        batches = replace(batches, train=batches.train[: fact["batches"]])
    layers = decoder_layers(cast(PreTrainedModel, model.base_model))
    if layers is None or not (batches.train or batches.held_out):
        return Kept()
    with running(cast(PreTrainedModel, model.base_model), rows, kernels):
        course, like, obstacle = tried(model, layers, documents(feed.sample, model.base_model.config), rows)
    if course.depth and accelerator.mixed_precision != "no":
        obstacle = f"mixed precision ({accelerator.mixed_precision}) is on"
    if obstacle is not None:
        return Kept(words=f"prefix: not cached, {obstacle}")
    if course.depth == 0:
        return Kept()
    return _opened(config, model, rows, kernels, batches, layers, course, like, note, recorded is not None)


def _batches(feed: Feed, rows: BatchLayout, world: int) -> Batches:
    held_out = feed.held_out if feed.held_out is not None else Examples.of([])
    shares = [held_out.select(np.arange(rank, len(held_out), world)) for rank in range(world)]
    evaluated = [
        [share[int(i)] for i in batch]
        for share in shares
        for batch in budgeted(share.lengths, feed.largest.tokens, rows.packed)
    ]
    return Batches(feed.first_pass(), evaluated)


def decoder_layers(base: PreTrainedModel) -> list[nn.Module] | None:
    """The decoder's layers, where it holds them in one list of its own."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        return None
    count = getattr(base.config.get_text_config(), "num_hidden_layers", 0)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return list(lists[0]) if len(lists) == 1 else None


# ---- on the user's model


def tried(
    model: Trainable, layers: list[nn.Module], examples: list[Example], rows: BatchLayout
) -> tuple[Course, Tensor, str | None]:
    """How many lower layers are frozen, an empty tensor like their states, and why these cannot be kept, or None.

    They can when training mode computes them like evaluation, and when the layers above give the same bits on them.
    """
    none = Course(0, None), torch.empty(0)
    with torch.enable_grad():
        outputs = _observed(model, layers, examples, rows)[0]
    if [place for place, _ in outputs] != list(range(len(layers))):
        return *none, None  # called otherwise than one after another: nothing is known of what is below
    depth = next((place for place, output in outputs if states_of(output).requires_grad), len(layers))
    if depth == 0:
        return *none, None
    widths = {len(output) if isinstance(output, tuple) else None for _, output in outputs}
    if len(widths) > 1 or any(part is not None for _, each in outputs if isinstance(each, tuple) for part in each[1:]):
        return *none, "its layers return more than their states"
    course = Course(depth, widths.pop())
    states = states_of(outputs[depth - 1][1]).detach()
    return course, states.new_empty(0, states.shape[-1], device="cpu"), _obstacle(model, layers, examples, rows, course)


def _obstacle(
    model: Trainable, layers: list[nn.Module], examples: list[Example], rows: BatchLayout, course: Course
) -> str | None:
    with torch.no_grad():
        trained = [_above(course, *_observed(model, layers, examples, rows)) for _ in range(2)]
        with evaluating(model):
            states, expected = _above(course, *_observed(model, layers, examples, rows))
            if not all(torch.equal(states, each) for each, _ in trained):
                return f"the first {course.depth} layers compute something else in training (dropout)"
            with relayed(layers, course):
                with filling(course) as reached:
                    _decode(model, examples, rows)
                with given(course, states):
                    found = _decode(model, examples, rows)
    if not torch.equal(reached[0], states) or not torch.equal(found, expected):
        return "the layers above the frozen ones read more of those than their states"
    return None


Outputs = list[tuple[int, Any]]  # the place of a layer, and what it returned, in the order of the calls


def _observed(
    model: Trainable, layers: list[nn.Module], examples: list[Example], rows: BatchLayout
) -> tuple[Outputs, Tensor]:
    outputs: Outputs = []

    def note(place: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.append((place, output))

    hooks = [layer.register_forward_hook(note(place)) for place, layer in enumerate(layers)]
    try:
        return outputs, _decode(model, examples, rows)
    finally:
        for hook in hooks:
            hook.remove()


def _above(course: Course, outputs: Outputs, last: Tensor) -> tuple[Tensor, Tensor]:
    """The states above the prefix, and the decoder's."""
    return states_of(outputs[course.depth - 1][1]), last


def _decode(model: Trainable, examples: Sequence[Example], rows: BatchLayout) -> Tensor:
    """The decoder's states for these examples in one batch."""
    batch, _ = as_batch(examples, rows.packed, rows.pad_id, _device(model))
    return cast(Tensor, model.get_decoder()(**batch.inputs, use_cache=False)[0])


def _device(model: Trainable) -> torch.device:
    return cast(torch.device, cast(PreTrainedModel, model.base_model).device)


def _computed(model: Trainable, course: Course, rows: BatchLayout, examples: Sequence[Example]) -> list[Tensor]:
    """The states above the prefix of each example, (tokens, hidden), computed in one batch."""
    with torch.no_grad(), filling(course) as reached:
        _decode(model, examples, rows)
    lengths = [len(example.input_ids) for example in examples]
    if rows.packed:
        return list(torch.split(reached[0][0], lengths))
    return [states[:length] for states, length in zip(reached[0], lengths, strict=True)]


# ---- on the disk


def _opened(
    config: TrainConfig,
    model: Trainable,
    rows: BatchLayout,
    kernels: Kernels,
    batches: Batches,
    layers: list[nn.Module],
    course: Course,
    like: Tensor,
    note: Callable[[str], None],
    resumed: bool,
) -> Kept:
    per_token = like.shape[-1] * like.itemsize  # bytes
    root = cache_folder() / "prefix"
    limit = int(free_bytes(root) * SHARE if config.prefix_cache_gb is None else config.prefix_cache_gb * GB)
    evaluated = sum(len(example.input_ids) for batch in batches.held_out for example in batch) * per_token
    train = batches.train if resumed else within(batches.train, limit - evaluated, per_token)
    plan = Plan.of([*batches.held_out, *train])
    about = facts(model, rows, kernels, layers, course.depth, plan)
    folder = root / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    make_room(root, folder, plan.tokens * per_token, limit)
    store = Store(folder, about, limit, note)
    prefix = Prefix(
        layers, course, plan, store, lambda examples: _computed(model, course, rows, examples), like, _device(model)
    )
    with running(cast(PreTrainedModel, model.base_model), rows, kernels), relayed(layers, course):
        verify(prefix, note)
    store.close()  # until the run begins
    part = "" if len(train) == len(batches.train) else f" for {len(train):,} of {len(batches.train):,} batches"
    words = f"prefix: {course.depth} of {len(layers)} layers cached{part}, {size(plan.tokens * per_token)} in {root}"
    fact = {"layers": course.depth, "batches": len(train)} if train else None
    return Kept(prefix, f"{words} (at most {size(limit)})", fact)


def within(batches: list[list[Example]], limit: int, per_token: int) -> list[list[Example]]:
    """The first of them, as many as `limit` bytes hold."""
    tokens = np.cumsum([sum(len(example.input_ids) for example in batch) for batch in batches], dtype=np.int64)
    return batches[: int(np.searchsorted(tokens * per_token, limit, side="right"))]


def verify(prefix: Prefix, note: Callable[[str], None]) -> None:
    """Compute one of the kept batches again; when a bit differs, all that is kept is removed."""
    there = (number for number in range(len(prefix.plan.places)) if number in prefix.store)
    number = next(there, None)
    kept = None if number is None else prefix.kept(number)
    if number is None or kept is None:
        return
    i, j = prefix.plan.places[number]
    now = prefix.compute(prefix.plan.packs[i])[j].cpu()
    if not torch.equal(kept, now):
        apart = float((kept - now).float().norm() / now.float().norm())
        note(f"the states kept in {prefix.store.folder} are not this model's (by {apart:.1e}): removed, computed anew")
        prefix.store.clear()


def facts(
    model: Trainable, rows: BatchLayout, kernels: Kernels, layers: Sequence[nn.Module], depth: int, plan: Plan
) -> dict[str, Any]:
    """All that the bits of the states depend on."""
    base = cast(PreTrainedModel, model.base_model)
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    cuda = base.device.type == "cuda"
    return {
        "layout": LAYOUT,
        "versions": [tailora.__version__, torch.__version__, transformers.__version__],
        "machine": torch.cuda.get_device_name(base.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": [str(base.dtype), torch.get_float32_matmul_precision()],
        "model": type(base).__name__,
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        "layers": [depth, len(layers)],
        "attention": "packed" if rows.packed else base.config._attn_implementation,
        "layer_kernels": kernels.layers,
        "weights": _digest(_weights(model, layers[depth:])),
        "documents": _digest(_lengths_and_ids(plan)),
    }


def _weights(model: Trainable, above: Sequence[nn.Module]) -> Iterator[bytes | memoryview]:
    """Names and bytes of the decoder's parameters and buffers, without the layers above the frozen ones."""
    decoder = model.get_decoder()
    left_out = {id(tensor) for layer in above for tensor in (*layer.parameters(), *layer.buffers())}
    for name, tensor, parts in held_parts(decoder):
        for part in parts if id(tensor) not in left_out else []:
            yield f"{name} {part.dtype} {tuple(part.shape)}".encode()
            yield memoryview(cast(Any, part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))


def _lengths_and_ids(plan: Plan) -> Iterator[bytes | memoryview]:
    for pack in plan.packs:
        yield np.array([len(pack), *(len(example.input_ids) for example in pack)], dtype=np.int64).tobytes()
        yield from (example.input_ids.tobytes() for example in pack)


def _digest(parts: Iterator[bytes | memoryview]) -> str:
    sum_ = hashlib.sha256()
    for part in parts:
        sum_.update(part)
    return sum_.hexdigest()
