"""`tailora doctor`."""

import pytest
import torch
from command_line import found, output

from tailora import __version__
from tailora.cli.doctor import collect_facts, conclusions


def test_json_describes_this_machine_and_what_works_on_every_device() -> None:
    facts = found("doctor")
    assert facts["packages"]["tailora"] == __version__
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["device"]["auto"] in facts["devices"]
    for device in facts["devices"].values():
        assert 0 < device["available"] <= device["memory"]
        assert device["dtype"] in {"stored", "bfloat16", "float16", "float32"}
        assert device["compiled layers"]
        assert set(device["quantize"]) >= {"nf4", "int8"}
        assert "works" in device["attention"].values()
    assert facts["devices"]["cpu"]["memory"] == facts["memory"]["total"]


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", "2.0B"), ("float16", "2.0B"), ("float32", "1.0B")])
def test_the_largest_base_follows_from_memory_and_precision(dtype: str, size: str) -> None:
    facts = {
        "device": {"auto": "cpu", "type": "cpu", "dtype": dtype, "memory": 64e9},
        "threads": {"torch": 2},
        "memory": {"available": 8e9},
    }
    assert any(f"a base model of {size} parameters" in line for line in conclusions(facts))


def test_a_machine_with_cards_is_shown_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {
        "name": "NVIDIA H100 80GB HBM3",
        "memory": 85e9,
        "available": 84e9,
        "bfloat16": True,
        "dtype": "bfloat16",
        "capability": "9.0",
        "attention": {"varlen_attn": "works"},
        "compiled layers": "the package triton is not installed",
        "quantize": {"nf4": "works"},
    }
    here = collect_facts()
    facts = {**here, "device": {"auto": "cuda:0", "type": "cuda", **card}}
    facts["devices"] = {"cuda:0": card, "cuda:1": card, **here["devices"]}
    monkeypatch.setattr("tailora.cli.doctor.collect_facts", lambda: facts)
    monkeypatch.setenv("COLUMNS", "80")
    table = output("doctor").partition("--dtype auto is")[0]
    assert max(map(len, table.splitlines())) <= 80
    words = " ".join(table.split())
    assert "cuda:0 name NVIDIA H100 80GB HBM3 memory 85.0 GB available 84.0 GB bfloat16 yes dtype bfloat16" in words
    assert words.count("attention: varlen_attn works") == 2
    assert words.count("compiled layers the package triton is not installed") == 2
