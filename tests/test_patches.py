"""What we use of transformers and torch that is not public still fits: here, and in the oldest and newest versions."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny import chat_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from tailora.core.adapter_set import AdapterSet
from tailora.engine.continuous_batching import ContinuousEngine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.errors import ConfigError
from tailora.kernels.attention import use_attention
from tailora.patches import (
    attention_of,
    before_loading,
    compiled_call,
    report_failures,
    set_compiled_call,
    sort_batches,
    survive_failures,
)

ROOT = Path(__file__).parents[1]


def test_a_model_is_on_meta_before_its_weights_are_read(tmp_path: Path) -> None:
    model, seen = chat_model(), list[Any]()
    model.save_pretrained(tmp_path)
    with before_loading(lambda new: seen.append({parameter.is_meta for parameter in new.parameters()})):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert seen == [{True}]
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(seen) == 1


def test_attention_is_the_one_that_was_set() -> None:
    model = chat_model()
    before = attention_of(model.config)
    with use_attention(model, "eager"):
        assert attention_of(model.config) == "eager"
    assert attention_of(model.config) == before


def test_a_compiled_call_replaces_the_forward_and_is_not_copied() -> None:
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager")
    assert compiled_call(layer) is not None
    set_compiled_call(layer, lambda x: x + 1)
    assert layer(torch.ones(2)).tolist() == [2, 2]
    assert [compiled_call(same) for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))] == [None, None]


def test_batches_are_sorted_and_failures_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, events, ended = list[int](), list[Token | Finish](), Event()
    engine = ContinuousEngine(AdapterSet(chat_model(), {}), [7], max_positions=64, max_requests=4)
    sort = engine._set_batch
    monkeypatch.setattr(engine, "_set_batch", lambda states: (batches.append(len(states)), sort(states)))

    def handle(event: Token | Finish) -> None:
        events.append(event)
        if isinstance(event, Finish):
            ended.set()

    engine.start()
    try:
        for number in (0, 1):
            params = SamplingParams(2, 0.0, ignore_eos=True)
            engine.submit(Request(f"request {number}", (1, 2, 3), None, params), handle)
            assert ended.wait(60)
            ended.clear()
            assert [type(event) for event in events] == [[Token, Token, Finish], [Finish]][number]
            assert batches[:2] == [1, 1]
            events.clear()

            def fail(*_: Any) -> None:
                raise RuntimeError("a mistake")

            monkeypatch.setattr("tailora.engine.continuous_batching.next_tokens", fail)
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("owner", "name", "use"),
    [
        (PreTrainedModel, "_load_pretrained_model", lambda: before_loading(print).__enter__()),
        (OutputRouter, "deliver_batch", lambda: report_failures(None, print)),
        (ContinuousBatchingManager, "_generation_step", lambda: survive_failures(None)),
        (nn.Module, "_compiled_call_impl", lambda: set_compiled_call(nn.Identity(), None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_longer_fits_is_an_error_that_names_it(
    owner: Any, name: str, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(ConfigError, match=r"(transformers|torch) \S+ has changed "):
        use()


def test_other_schedulers_and_configs_are_refused() -> None:
    manager: Any = type("Manager", (), {"batch_processor": type("Processor", (), {"scheduler": FIFOScheduler})})
    with pytest.raises(ConfigError, match="has changed scheduler"):
        sort_batches(manager, print)
    with pytest.raises(ConfigError, match="has changed _attn_implementation"):
        attention_of(object())


@pytest.mark.network
@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_the_oldest_and_the_newest_supported_transformers_fit(version: str, tmp_path: Path) -> None:
    lines = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'"transformers>=([\d.]+),<6"', lines)
    package = f"transformers=={oldest}.*" if version == "oldest" else "transformers>=5,<6"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), package]
    subprocess.run(install, check=True)
    files = [__file__, str(ROOT / "tests" / "engine" / "test_engines.py")]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "USE_HUB_KERNELS": "NO"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
