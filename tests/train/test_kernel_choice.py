import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import PartialState
from runs import assert_resumed_alike
from tiny import chat_model
from torch import nn
from torch._inductor.exc import InductorError
from torch.fx import GraphModule
from torch.nn import functional as F

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.compiled_layers import CompiledLayers, decoder_layers, paying_tokens
from tailora.kernels.loss import FROZEN
from tailora.train import kernel_choice, kernel_comparison
from tailora.train.config import TrainConfig
from tailora.train.kernel_choice import COMPILED, PLAIN, Kernels, choose_kernels
from tailora.train.loss import BatchLayout
from tailora.train.trainer import run


class TimedLayers(CompiledLayers):
    """Layers that are called as they are. Within the block they count as compiled, at another speed."""

    speed = compiled_speed = 1.0

    @contextmanager
    def used_by(self, _: Any) -> Iterator[None]:
        type(self).speed, before = self.compiled_speed, self.speed
        try:
            yield
        finally:
            type(self).speed = before


@pytest.fixture
def compile_at_speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """speed: of compiled layers, relative to that of others."""

    def patch(speed: float) -> None:
        PartialState()
        monkeypatch.setattr(TimedLayers, "compiled_speed", speed)
        monkeypatch.setattr(kernel_choice, "CompiledLayers", TimedLayers)
        monkeypatch.setattr(kernel_choice, "_seconds", lambda *_: 1e-3 / TimedLayers.speed)

    return patch


def chosen(config: TrainConfig, tokens: float, base: Any = None) -> Kernels:
    """Returns the kernels of a model of two layers."""
    model = LoRAModel(base or chat_model(), LoRAConfig(r=2, target_modules=["q_proj"])).train()
    ids = np.arange(40, dtype=np.int32)
    return choose_kernels(config, model, BatchLayout(True, FROZEN, 0), tokens, Example.of_text(ids))


PAYING = 1000  # tokens


@pytest.mark.parametrize(
    ("needed", "tokens", "speed", "layers", "reason"),
    [
        pytest.param(PAYING, PAYING, 1.25, COMPILED, "a layer takes 0.80 times as long as", id="faster"),
        pytest.param(PAYING, PAYING, 0.5, PLAIN, "compiled, but a layer takes 2.00 times as long as", id="slower"),
        pytest.param(PAYING, 256, 1.25, PLAIN, "it saves over 256 tokens; it pays off from 1,000", id="short"),
        pytest.param(None, 1e9, 1.25, PLAIN, "no speedup is known on this CPU in float32; use", id="no gain"),
    ],
)
def test_compiled_layers_are_taken_if_the_run_pays_for_compiling_and_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
    compile_at_speed: Callable[[float], None],
    needed: int | None,
    tokens: float,
    speed: float,
    layers: str,
    reason: str,
) -> None:
    compile_at_speed(speed)
    monkeypatch.setattr(kernel_choice, "paying_tokens", lambda *_: needed)
    kernels = chosen(TrainConfig(), tokens)
    assert kernels.layers == layers
    assert reason in kernels.description


def test_compiled_layers_that_are_asked_for_are_taken_at_any_speed(compile_at_speed: Callable[[float], None]) -> None:
    compile_at_speed(0.5)
    kernels = chosen(TrainConfig(fast="compile"), 1)
    assert kernels.layers == COMPILED
    assert "a layer takes 2.00 times as long as without compiling" in kernels.description


def test_each_kind_of_layer_has_to_pay() -> None:
    base, device = chat_model(), torch.device("cuda")
    one = paying_tokens(device, torch.bfloat16, decoder_layers(base))
    LoRAModel(base, LoRAConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj"]))
    assert paying_tokens(device, torch.bfloat16, decoder_layers(base)) == 2 * cast(int, one)


def test_compiled_layers_that_give_nan_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, compile_at_speed: Callable[[float], None]
) -> None:
    compile_at_speed(1.25)
    monkeypatch.setattr(kernel_comparison, "relative_difference", lambda *_: math.nan)
    with pytest.raises(ConfigError, match="their results differ from transformers' layers by nan"):
        chosen(TrainConfig(fast="compile"), 1)


def test_layers_that_text_does_not_reach_are_not_timed(compile_at_speed: Callable[[float], None]) -> None:
    compile_at_speed(2)
    base = chat_model()
    base.tower = nn.ModuleList([deepcopy(decoder_layers(base)[0])])  # after the layers that are called
    assert chosen(TrainConfig(fast="compile"), 1, base).layers == COMPILED


def test_the_time_of_a_layer_is_that_of_the_kernels_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is in use while it is timed, in turns with the plain layer."""
    seen: list[str] = []

    def seconds(calls: Any) -> float:
        for layer, *_ in calls:
            seen.append("compiled" if layer._compiled_call_impl is not None else type(layer).__name__)
        return 1.0

    monkeypatch.setattr(kernel_choice, "_seconds", seconds)
    monkeypatch.setattr(kernel_choice, "CompiledLayers", partial(CompiledLayers, backend="eager"))
    monkeypatch.setattr(kernel_choice, "compare_layers", lambda *_: (None, "checked"))
    PartialState()
    assert "a layer takes 1.00" in chosen(TrainConfig(fast="compile"), 1).description
    assert seen == ["compiled", "LlamaDecoderLayer"] * 4


def test_the_cause_is_said_if_the_compiler_fails(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise InductorError(ValueError("no such instruction"), None)

    monkeypatch.setattr(kernel_choice, "compare_layers", fails)
    with pytest.raises(ConfigError, match=r"--fast compile needs compiled layers.*ValueError: no such instruction"):
        run(settings(max_steps=1, fast="compile"))


@pytest.mark.exhaustive
def test_layers_that_cannot_be_compiled_with_their_dropout_are_refused_before_the_run(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: GraphModule, _: Any) -> Any:
        if any(node.target is F.dropout and node.args[2] for node in graph.graph.nodes):  # in training mode
            raise ValueError("no dropout")
        return graph

    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kernel_choice, "CompiledLayers", partial(CompiledLayers, backend=backend))
    with pytest.raises(ConfigError, match=r"--fast compile needs compiled layers.*ValueError: no dropout"):
        run(settings(max_steps=1, fast="compile", lora_dropout=0.1))


@pytest.mark.exhaustive
def test_a_compiled_run_with_dropout_is_resumed_bit_for_bit(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tailora.train.kernel_choice.CompiledLayers", partial(CompiledLayers, backend="aot_eager"))

    def kernels(config: TrainConfig) -> str:
        return str(json.loads((Path(config.output_dir) / "run.json").read_text())["kernels"])

    common = {"max_steps": 3, "save_steps": 1, "lora_dropout": 0.1, "fast": "compile"}
    whole, stopped = (settings(output_dir=str(tmp_path / name), **common) for name in ("whole", "stopped"))
    run(whole)
    assert "compiled, a layer takes" in kernels(whole)
    assert "checked against the layers of transformers" in kernels(whole)
    assert_resumed_alike(whole, stopped, 2)
    assert "as long as without compiling, checked when the run was started" in kernels(stopped)
