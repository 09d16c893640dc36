"""Kept states of the frozen lower layers: the results without them, in less time, from whatever is on the disk."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, OPTConfig, PreTrainedModel

from tailora.kernels.prefix import Relay
from tailora.kernels.store import ABOUT, Store
from tailora.train import events
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

LAYERS, TOP = 4, [2, 3]
GROUPED: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "intermediate_size": 48, "head_dim": 8}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
DROPS_NOTHING = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
OPT: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: chat_model(vocab_size=320, num_hidden_layers=LAYERS, initializer_range=0.2),
    "gpt2": lambda: made(GPT2Config(vocab_size=320, **GPT2, **DROPS_NOTHING)),
    "gpt2, dropout": lambda: made(GPT2Config(vocab_size=320, **GPT2)),
    "gemma2": lambda: made(Gemma2Config(vocab_size=320, **GROUPED, num_attention_heads=4, num_key_value_heads=2)),
    "opt": lambda: made(OPTConfig(vocab_size=320, **OPT, num_attention_heads=4, dropout=0.0)),
}
WAYS: dict[str, dict[str, Any]] = {
    "llama": {"model": "llama"},
    "llama, checkpointed": {"model": "llama", "gradient_checkpointing": True},
    "llama, padded": {"model": "llama", "packing": "off"},
    "llama, adapter dropout": {"model": "llama", "lora_dropout": 0.2, "gradient_accumulation_steps": 2},
    "llama, everything": {
        "model": "llama",
        "gradient_checkpointing": True,
        "lora_dropout": 0.2,
        "use_rslora": True,
        "gradient_accumulation_steps": 2,
        "dtype": "bfloat16",
    },
    "gpt2": {"model": "gpt2"},
    "gpt2, checkpointed": {"model": "gpt2", "gradient_checkpointing": True},
    "gemma2, not packed": {"model": "gemma2"},
    "opt": {"model": "opt"},
}


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(parent / name)
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(parent / name)
    return {name: parent / name for name in MODELS}


Top = Callable[..., TrainConfig]


@pytest.fixture
def top(settings: Any, folders: dict[str, Path], tmp_path: Path) -> Top:
    """Settings of three epochs of the top layers; `name` is that of the output folder."""

    def make(name: str, model: str = "llama", **changes: Any) -> TrainConfig:
        shared = {"layers_to_transform": TOP, "num_train_epochs": 3, "eval_steps": 4}
        own = {"model": str(folders[model]), "output_dir": str(tmp_path / name)}
        return settings(**{**shared, **own, **changes})  # type: ignore[no-any-return]

    return make


def adapter(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(config: TrainConfig) -> list[float]:
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


class Heard:
    """What a run said, and how often its layers computed."""

    def __init__(self, config: TrainConfig, at_step: Callable[[int], None] | None = None) -> None:
        self.notes: list[str] = []
        self.calls = [0] * LAYERS
        self.calls_at: list[list[int]] = []  # after every step
        self.words = ""
        self.at_step = at_step
        self.result = run(config, on_event=self.event, on_ready=self.ready)

    def event(self, event: events.Event) -> None:
        match event:
            case events.Note():
                self.notes.append(event.text)
            case events.Prepared():
                self.words = event.header["kernels"]
            case events.Stepped():
                self.calls_at.append(list(self.calls))
                if self.at_step:
                    self.at_step(event.step)

    def ready(self, model: Any, *_: Any) -> None:
        if "Llama" in type(model.base_model).__name__:
            return  # hooks would send its layers down the plain path
        for place, layer in enumerate(layers_of(model)):
            norm = next(module for module in layer.modules() if "norm" in type(module).__name__.lower())
            norm.register_forward_pre_hook(lambda *_, place=place: self.count(place))

    def count(self, place: int) -> None:
        self.calls[place] += 1


def layers_of(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS)


@pytest.mark.parametrize("way", WAYS)
def test_results_are_those_without_kept_states(top: Top, way: str, own_cache: Path) -> None:
    kept, not_kept = top("kept", **WAYS[way]), top("not", **WAYS[way], prefix_cache_gb=0)
    heard = Heard(kept)
    assert f"prefix: 2 of {LAYERS} layers cached, " in heard.words
    assert str(own_cache) in heard.words
    assert "prefix" not in Heard(not_kept).words
    assert losses(kept) == pytest.approx(losses(not_kept), abs=2e-5)
    one, other = (
        load_file(Path(config.output_dir) / "adapter/adapter_model.safetensors") for config in (kept, not_kept)
    )
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-3 * other[name].norm() + 1e-6
    assert not [note for note in heard.notes if "kept" in note]


def test_the_first_epoch_has_the_bits_of_the_plain_path(top: Top) -> None:
    """Each document is computed in the company that it has there."""
    kept, not_kept = top("kept"), top("not", prefix_cache_gb=0)
    run(kept)
    run(not_kept)
    assert losses(kept)[:8] == losses(not_kept)[:8]  # before, 4 steps, their evaluation, 2 more steps of 6 an epoch


@pytest.mark.parametrize("model", ["gpt2", "gemma2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_lower_layers_compute_in_the_first_epoch_only_and_upper_ones_alone_are_computed_again(
    top: Top, model: str, checkpointed: bool
) -> None:
    """Counted on the plain path, whose layers call their norms: 6 batches of 4 an epoch."""
    heard = Heard(top("out", model=model, gradient_checkpointing=checkpointed, eval_steps=0))
    twice = 2 if checkpointed else 1  # the backward computes upper layers again, and only those
    per_step = [b[3] - a[3] for a, b in pairwise(heard.calls_at)]
    assert per_step == [twice] * 17
    lower = [calls[0] - heard.calls_at[0][0] for calls in heard.calls_at]
    assert lower == [0, 1, 2, 3, 4, *[5] * 13]
    again = Heard(top("again", model=model, gradient_checkpointing=checkpointed, eval_steps=0))
    assert again.calls[:2] == [0, 0]
    assert again.calls[3] == heard.calls[3] > 0
    assert adapter(top("again")) == adapter(top("out"))


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_the_backward_ends_below_the_first_adapted_layer(top: Top, fast: str) -> None:
    """Without kept states, checkpointed: lower layers compute once a step, upper ones twice."""
    config = top("out", model="gpt2", fast=fast, prefix_cache_gb=0, gradient_checkpointing=True, eval_steps=0)
    calls = Heard(config).calls_at
    per_step = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(calls)]
    assert per_step == [[1, 1, 2, 2]] * 17


def test_a_second_run_computes_nothing_below_and_has_the_same_bytes(top: Top, own_cache: Path) -> None:
    one, two = top("one"), top("two", learning_rate=3e-3)
    run(one)
    before = {path: path.stat().st_size for path in own_cache.rglob("*.states")}
    Heard(two)
    assert {path: path.stat().st_size for path in own_cache.rglob("*.states")} == before
    shutil.rmtree(own_cache)
    three = top("three", learning_rate=3e-3)
    run(three)
    assert adapter(two) == adapter(three)


def stop_at(step: int) -> Callable[[int], None]:
    import os
    import signal

    return lambda number: os.kill(os.getpid(), signal.SIGINT) if number == step else None


@pytest.mark.parametrize(
    ("way", "lost"),
    [
        ("llama", False),
        ("llama", True),
        ("llama, adapter dropout", True),
        ("llama, everything", False),
        ("llama, everything", True),
        pytest.param("llama, checkpointed", False, marks=pytest.mark.slow),
        pytest.param("llama, checkpointed", True, marks=pytest.mark.slow),
        ("gemma2, not packed", True),
    ],
)
def test_an_interrupted_run_continues_to_the_same_bytes(top: Top, way: str, lost: bool, own_cache: Path) -> None:
    """With layer kernels and flat buffers where they apply; in the second epoch, the kept states there or lost."""
    whole, stopped = top("whole", **WAYS[way]), top("stopped", **WAYS[way])
    words = Heard(whole).words
    assert ("layer kernels: Llama family, verified" in words) == way.startswith("llama")
    shutil.rmtree(own_cache)
    at = 4 if "gradient_accumulation_steps" in WAYS[way] else 8
    with pytest.raises(events.Interrupted):
        Heard(stopped, at_step=stop_at(at))
    if lost:
        shutil.rmtree(own_cache)
    run(TrainConfig(**{**stopped.model_dump(), "resume_from_checkpoint": "latest"}))
    assert adapter(stopped) == adapter(whole)
    assert losses(stopped) == losses(whole)


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    about = json.loads((folder / ABOUT).read_text())
    store = Store(folder, about, 10**9, print)
    yield store
    store.close()


def test_states_of_another_model_are_refused_and_computed_anew(top: Top, own_cache: Path) -> None:
    one, two = top("one"), top("two")
    run(one)
    (folder,) = own_cache.iterdir()
    lines = [line.split() for path in folder.glob("*.index") for line in path.read_text().splitlines()]
    with opened(folder) as store:
        store.clear()
        for number, _, size, _ in lines:
            store.write(int(number), torch.ones(int(size) // 4))
    heard = Heard(two)
    (note,) = heard.notes
    assert "are not this model's" in note
    assert adapter(two) == adapter(one)


def test_damaged_states_are_computed_anew(top: Top, own_cache: Path) -> None:
    one, two = top("one"), top("two")
    run(one)
    (path,) = own_cache.rglob("*.states")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + bytes(len(content) // 3))
    heard = Heard(two)
    assert adapter(two) == adapter(one)
    assert not heard.notes


def test_a_limit_keeps_as_many_batches_as_fit(top: Top, own_cache: Path) -> None:
    small, not_kept = top("small", prefix_cache_gb=60e-6), top("not", prefix_cache_gb=0)
    heard = Heard(small)
    run(not_kept)
    assert "layers cached for " in heard.words
    assert " of 6 batches" in heard.words
    assert sum(path.stat().st_size for path in own_cache.rglob("*.states")) <= 60_000
    assert losses(small) == pytest.approx(losses(not_kept), abs=2e-5)
    assert not heard.notes


def test_a_resume_keeps_what_was_kept_whatever_the_limit_is_now(top: Top) -> None:
    whole, stopped = (top(name, prefix_cache_gb=60e-6) for name in ("whole", "stopped"))
    run(whole)
    with pytest.raises(events.Interrupted):
        Heard(stopped, at_step=stop_at(8))
    run(TrainConfig(**{**stopped.model_dump(), "resume_from_checkpoint": "latest", "prefix_cache_gb": None}))
    assert adapter(stopped) == adapter(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"fast": "off"},
        {"prefix_cache_gb": 0},
        {"layers_to_transform": None},
        {"layers_to_transform": [0, 3]},
        {"layers_to_transform": None, "target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"num_train_epochs": 1, "validation_split": 0, "eval_steps": 0},
    ],
)
def test_where_nothing_is_gained_nothing_is_kept_and_nothing_said(
    top: Top, own_cache: Path, changes: dict[str, Any]
) -> None:
    heard = Heard(top("out", **changes))
    assert "prefix" not in heard.words
    assert not own_cache.exists()


def test_one_epoch_keeps_held_out_states_only(top: Top, own_cache: Path) -> None:
    kept, not_kept = (top(name, num_train_epochs=1, **more) for name, more in PAIR)
    assert "layers cached, " in Heard(kept).words
    run(not_kept)
    held_out = sum(len(path.read_text().splitlines()) for path in own_cache.rglob("*.index"))
    assert held_out == 6
    assert adapter(kept) == adapter(not_kept)


PAIR: list[tuple[str, dict[str, Any]]] = [("kept", {}), ("not", {"prefix_cache_gb": 0})]


def test_dropout_below_is_said(top: Top, own_cache: Path) -> None:
    heard = Heard(top("out", model="gpt2, dropout", max_steps=2))
    assert "prefix: not cached, the first 2 layers compute something else in training (dropout)" in heard.words
    assert not own_cache.exists()


def test_only_the_head_trained_keeps_all_layers(top: Top) -> None:
    changes = {"layers_to_transform": None, "target_modules": ["lm_head"], "max_steps": 14}
    kept, not_kept = (top(name, **changes, **more) for name, more in PAIR)
    assert f"prefix: {LAYERS} of {LAYERS} layers cached" in Heard(kept).words
    run(not_kept)
    assert losses(kept) == pytest.approx(losses(not_kept), abs=2e-5)


def test_the_classes_are_what_they_were_afterwards(top: Top) -> None:
    found: list[type] = []
    heard = Heard(top("out", max_steps=8), at_step=lambda _: None)
    layers = layers_of(heard.result.model.base_model)
    found = [type(layer) for layer in layers]
    assert not any(issubclass(cls, Relay) for cls in found)
    assert {cls.__name__ for cls in found} == {"LlamaDecoderLayer"}
    assert not any({"course", "place"} & vars(layer).keys() for layer in layers)
