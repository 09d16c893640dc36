"""`tailora doctor`."""

import json
from pathlib import Path

import pytest
import torch

from tailora import __version__
from tailora.cli.doctor import conclusions
from tailora.cli.main import main


def test_json_tells_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["tailora"] == __version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]


def test_memory_is_what_training_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"memory.max": "3000000\n", "memory.current": "1000000\n", "memory.stat": "inactive_file 0\n"}
    for name, content in {**files, "groups": "0::/\n"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("tailora.train.memory.CGROUP", tmp_path / "groups")
    monkeypatch.setattr("tailora.train.memory.CGROUPS", tmp_path)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["available"] == 2_000_000


def test_words_hold_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for fact in ("bfloat16", "OMP_NUM_THREADS", torch.__version__, "--dtype auto"):
        assert fact in shown


@pytest.mark.parametrize(("bfloat16", "size"), [(True, "2.0B"), (False, "1.0B")])
def test_the_largest_base_follows_from_memory_and_precision(bfloat16: bool, size: str) -> None:
    facts = {
        "device": {"type": "cpu", "bfloat16": bfloat16},
        "threads": {"torch": 2},
        "memory": {"available": 8e9},
    }
    assert any(f"a base model of {size} parameters" in line for line in conclusions(facts))
