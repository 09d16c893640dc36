"""Tasks of lm-evaluation-harness on a model with an adapter, where its package is installed: pip install lm-eval."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import check_refused, output
from tiny import chat_model, chat_tokenizer
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import main
from tailora.errors import DataError
from tailora.evaluation.lm_eval import find_tasks

MISSING = importlib.util.find_spec("lm_eval") is None
COLOURS = ["red", "green", "blue"]
QUIZ = """\
task: tiny_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base without a chat template, an adapter, rows of choices, and a task of the same rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = chat_tokenizer(["thing red green blue"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    chat_model(max_position_embeddings=512, initializer_range=0.3).save_pretrained(tmp_path / "base")
    model = LoRAModel(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoRAConfig(r=4))
    torch.manual_seed(1)
    for parameter in model.lora_layers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_adapter(tmp_path / "adapter")
    rows = [{"question": f"thing {n}?", "choices": COLOURS, "answer": n % 3} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(QUIZ.format(rows=tmp_path / "rows.jsonl"))
    return tmp_path


def found(capsys: pytest.CaptureFixture[str], *tokens: object, code: int = 0) -> dict[str, Any]:
    assert main([*map(str, tokens), "--json"]) == code, capsys.readouterr().err
    payload: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return payload


@pytest.mark.lmeval
@pytest.mark.skipif(MISSING, reason="pip install lm-eval")
@pytest.mark.filterwarnings("ignore")  # of its packages
def test_the_harness_and_our_own_choices_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ["eval", folder / "adapter", "--dtype", "float32"]
    ours = found(capsys, *tokens, "--data", folder / "rows.jsonl")
    tasks = ["--tasks", "tiny_quiz", "--include-path", folder / "tasks"]
    gates = ["--gate", "tiny_quiz/acc>=0", "--gate", "tiny_quiz/acc_change>2"]
    theirs = found(capsys, *tokens, *tasks, *gates, code=4)
    for mine, name in (("accuracy", "tiny_quiz/acc"), ("accuracy_norm", "tiny_quiz/acc_norm")):
        for side in ("metrics", "base", "change"):
            assert theirs[side][name] == ours[side][mine], (side, name)
    assert ours["metrics"] != ours["base"]
    assert [gate["met"] for gate in theirs["gates"]] == [True, False]
    assert theirs["data"] is None
    both = found(capsys, *tokens, *tasks, "--data", folder / "rows.jsonl", "--limit", 7)
    assert both["metrics"].keys() == {"accuracy", "accuracy_norm", "tiny_quiz/acc", "tiny_quiz/acc_norm"}
    assert both["metrics"]["tiny_quiz/acc"]["n"] == 7
    assert "tiny_quiz/acc_norm" in output(*[str(token) for token in (*tokens, *tasks)])

    for bad, hint in (
        (["--tasks", "tiny_quzi"], "unknown task 'tiny_quzi'; did you mean tiny_quiz"),
        (["--tasks", "tiny_quiz", "--gate", "tiny_quiz/ac>0"], "did you mean tiny_quiz/acc"),
    ):
        check_refused(hint, *[str(token) for token in (*tokens, "--include-path", folder / "tasks", *bad)])


def test_tasks_that_cannot_be_loaded_come_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: list[str]) -> None:
        raise ConnectionError("no route\nto host")

    manager = SimpleNamespace(all_tasks=["quiz"], load=load)
    monkeypatch.setattr("tailora.evaluation.lm_eval.require_packages", lambda *_, **__: None)
    monkeypatch.setattr("tailora.evaluation.lm_eval._task_manager", lambda *_: manager)
    with pytest.raises(
        DataError, match=r"--tasks quiz: cannot load the tasks: no route\. If data is missing, run this once with"
    ):
        find_tasks(["quiz"])


@pytest.mark.skipif(not MISSING, reason="lm-eval is installed")
def test_without_its_package_it_says_what_to_install(folder: Path) -> None:
    check_refused(
        "lm_eval not installed; run: pip install 'tailora[eval]'", "eval", folder / "adapter", "--tasks", "hellaswag"
    )
