"""Runs `tailora` in the test's own process."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import main


def call(*tokens: object) -> tuple[int, str, str]:
    """Returns the exit code, and what the command wrote to stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(token) for token in tokens])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def found(*tokens: object) -> dict[str, Any]:
    """Returns the object that the command prints with --json."""
    payload: dict[str, Any] = json.loads(output(*tokens, "--json").splitlines()[-1])
    return payload


def output(*tokens: object) -> str:
    """Returns what the command prints to stdout. It has to succeed."""
    code, said, told = call(*tokens)
    assert code == 0, told
    return said


def check_refused(hint: str, *tokens: object) -> str:
    """Checks that the command exits with 2 and a message that contains the hint. Returns the message."""
    code, said, told = call(*tokens)
    assert code == 2, told
    assert hint in told or hint in " ".join(told.split())
    assert not said
    return told


def save_random_adapter(folder: Path, base: Path, *, seed: int = 1, std: float = 0.05, **settings: Any) -> Path:
    """Saves an adapter of the model in the folder `base`, all of whose parameters are random."""
    torch.manual_seed(seed)
    model = LoRAModel(LlamaForCausalLM.from_pretrained(base), LoRAConfig(**{"r": 4, **settings}))
    for parameter in model.lora_layers.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.save_adapter(folder)
