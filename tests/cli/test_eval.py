"""`tailora eval`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call, check_refused, found, save_random_adapter
from judge_server import KEY, fake_judge
from tiny import chat_model
from transformers import AutoTokenizer

from benchmarks.serving.server_process import free_port
from tailora.formats.run_folder import trained_rows
from tailora.train.config import TrainConfig
from tailora.train.run_log import write_rows

QUIZ = [{"question": f"thing {n}?", "choices": ["red", "green", "blue"], "answer": n % 3} for n in range(12)]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("eval") / "adapter", tiny_model, seed=0, std=0.1)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    return path


@pytest.mark.slow
def test_the_adapter_is_judged_beside_the_base_that_it_names(adapter: Path, tiny_model: Path, chats: Path) -> None:
    both = found("eval", adapter, "--data", chats, "--dtype", "float32")
    alone = found("eval", tiny_model, "--data", chats, "--dtype", "float32")
    assert both["model"] == str(tiny_model)
    assert both["base"] == alone["metrics"]
    assert alone["base"] is alone["adapter"] is None
    assert both["metrics"].keys() == {"loss", "perplexity"}
    for name, one in both["metrics"].items():
        low, high = one["interval"]
        assert low < one["value"] < high, name
        assert one["n"] == 24
    change = both["change"]["loss"]
    assert change["value"] == pytest.approx(both["metrics"]["loss"]["value"] - both["base"]["loss"]["value"])


def test_rows_get_the_system_message_that_the_run_trained_with(adapter: Path, chats: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"system": "be brief"}}))

    def tokens(*words: object) -> int:
        return int(found("eval", *words, "--data", chats, "--no-base", "--limit", 2)["data"]["tokens"])

    assert tokens(tmp_path / "run") == tokens(adapter, "--system", "be brief") > tokens(adapter)


def test_the_columns_of_the_run_are_named_once_where_data_is_read(
    adapter: Path, quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"field": {"prompt": "question"}}}))
    command = ["eval", tmp_path / "run", "--no-base", "--limit", "2"]
    code, _, told = call(*command, "--data", quiz)
    assert code == 0, told
    assert told.count("using the column names from training: --field prompt=question; ") == 1
    monkeypatch.setattr("tailora.cli.eval.launch", lambda *_, **__: 0)  # the processes that it starts say it
    assert "as in training" not in call(*command, "--data", quiz, "--nproc-per-node", "2", "--device", "cpu")[2]


@pytest.mark.slow
def test_choices_bring_accuracy(adapter: Path, quiz: Path) -> None:
    both = found("eval", adapter, "--data", quiz)
    assert both["metrics"].keys() == {"accuracy", "accuracy_norm"} == both["change"].keys()
    assert both["metrics"]["accuracy"]["n"] == 12
    more = found("eval", adapter, "--data", quiz, "--metric", "loss,acc", "--limit", 5)
    assert more["metrics"].keys() == {"loss", "accuracy"}
    assert more["metrics"]["loss"]["n"] == 5


@pytest.mark.slow
def test_gates_decide_the_exit_code(adapter: Path, chats: Path) -> None:
    tokens = ["eval", adapter, "--data", chats]
    code, said, told = call(*tokens, "--gate", "loss<100,ppl>0", "--gate", "loss_change>=-50")
    assert code == 0
    assert said.count("gate met: ") == 3
    assert "tuned - base" in said
    code, said, told = call(*tokens, "--gate", "loss<100", "--gate", "loss<.1", "--json")
    assert code == 4
    payload = json.loads(said.splitlines()[-1])
    assert [each["met"] for each in payload["gates"]] == [True, False]
    assert payload["gates"][1] == {"gate": "loss<0.1", "value": payload["metrics"]["loss"]["value"], "met": False}
    assert told.splitlines()[-1].startswith("gate not met: loss<0.1 (measured: ")
    assert "loss<100" not in told


@pytest.mark.slow
def test_metrics_score_the_answers(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Rows whose reply is what the model says, one with other spaces, one in other letters, one wrong."""
    tokens = ["predict", "--model", tiny_model, "--adapter", adapter, "--max-new-tokens", 12]
    questions = ["hello", "what colour", "is thing 7", "it is"]
    asked = [part for question in questions for part in ("--prompt", question)]
    said = [row["answer"] for row in found(*tokens, *asked)["predictions"]]
    replies = [said[0], f"  {said[1]}\n", said[2].swapcase(), f"x{said[3]}"]
    path = tmp_path / "rows.jsonl"
    pairs = zip(questions, replies, strict=True)
    rows = [{"prompt": asked, "completion": reply, "level": number} for number, (asked, reply) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m.py").write_text("def easy(completions, level, **kwargs):\n    return [n < 3 for n in level]\n")

    judged = ["eval", adapter, "--data", path, "--metric", "exact_match", "--max-new-tokens", 12]
    got = found(*judged, "--metric", f"{tmp_path}/m.py:easy", "--gate", "easy>=.75", "--gate", "exact_match_change<=1")
    assert got["metrics"].keys() == got["base"].keys() == got["change"].keys() == {"exact_match", "easy"}
    exact = got["metrics"]["exact_match"]
    assert (exact["value"], exact["after"], exact["n"], got["metrics"]["easy"]["value"]) == (0.5, 0.5, 4, 0.75)
    assert exact["before"] == got["base"]["exact_match"]["value"]
    assert exact["change"]["value"] == got["change"]["exact_match"]["value"]
    assert [answer["after"]["scores"]["exact_match"] for answer in got["answers"]] == [1, 1, 0, 0]
    assert [answer["tuned"] for answer in got["answers"]] == [text.strip() for text in said]
    assert all(gate["met"] for gate in got["gates"])
    alone = found(*judged, "--no-base", "--metric", "loss")
    assert alone["metrics"].keys() == {"exact_match", "loss"}
    assert alone["metrics"]["exact_match"]["value"] == 0.5
    assert all(answer["before"] is None for answer in alone["answers"])
    (tmp_path / "m.py").write_text("def fails(completions, **kwargs):\n    return ['yes' for _ in completions]\n")
    told = check_refused("m.py:fails: expected None or a number", *judged, "--metric", f"{tmp_path}/m.py:fails")
    assert "answering" not in told  # which takes time


@pytest.mark.slow
def test_a_judge_compares_the_answers(
    adapter: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    tokens = ["eval", adapter, "--data", chats, "--limit", 4, "--max-new-tokens", 6, "--metric", "max_length:3"]
    with fake_judge(monkeypatch) as server:
        tokens += ["--metric", f"judge:{server.url}", "--judge-model", "fake", "--gate", "judge>=.5"]
        check_refused("add --output-dir", *tokens)
        check_refused("compares an adapter with its base model", *tokens, "--no-base")
        assert not server.requests
        got, sent = found(*tokens, "--output-dir", folder), len(server.requests)
        assert got["judge"] == {"requests": sent - 1, "cached": 0}  # without the one that tries it
        code, page, _ = call(*tokens, "--output-dir", folder)
    assert (code, len(server.requests)) == (0, sent)
    metric = got["metrics"]["judge"]
    assert (metric["before"], metric["after"], metric["order_changed"], metric["examples"]) == (0.5, 0.5, 1.0, 4)
    assert [*got["metrics"]] == ["max_length:3", "judge"]
    assert "100% of its verdicts changed with the order" in got["findings"][1]
    assert "the judge preferred the tuned answers to 50% of 4 prompts" in " ".join(page.split())
    assert KEY.encode() not in b"".join(file.read_bytes() for file in folder.iterdir())


@pytest.mark.slow
def test_a_report_is_written(adapter: Path, chats: Path, tmp_path: Path) -> None:
    tokens = ["eval", adapter, "--data", chats, "--output-dir", tmp_path / "out", "--limit", 4, "--no-base"]
    first = found(*tokens)
    assert first["base"] is first["change"] is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == {"kind": "eval", **first}
    found(*tokens)  # over its own


def test_a_run_is_followed_and_told_what_it_was_trained_on(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["--model", tiny_model, "--max-steps", 1, "--dtype", "float32", "--metric-examples", 0, "--max-length", 28]
    trained = found("train", "--data", chats, "--eval-data", chats, "--output-dir", out, *common)
    code, said, told = call("eval", out, "--data", chats, "--dtype", "float32", "--json")
    assert code == 0
    _, page, _ = call("eval", out, "--data", chats, "--no-base", "--limit", 2, "--gate", "loss<100")
    assert "gate met on training rows: loss<100" in page
    assert "Note: 2 of 2 evaluated rows were used for training" in page
    assert "note: 24 of 24 evaluated rows were used for training; expect worse scores on new rows" in told
    payload = json.loads(said)
    assert payload["metrics"]["loss"]["value"] == pytest.approx(trained["eval_loss_after"], rel=1e-5)
    assert payload["base"]["loss"]["value"] == pytest.approx(trained["eval_loss_before"], rel=1e-5)
    assert payload["data"]["truncated"] > 0  # at the run's own max_length


def test_an_adapter_that_is_trained_further_has_the_rows_of_both_runs(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    for name, adapter, hashes in (("first", None, [b"1" * 8, b"2" * 8]), ("second", "first", [b"3" * 8])):
        config = TrainConfig(adapter=adapter and str(tmp_path / adapter), eval_data="rows.jsonl")
        data: Any = SimpleNamespace(trained_rows=hashes, skipped=[])
        write_rows(tmp_path / name, config, data)
    assert trained_rows(tmp_path / "second" / "adapter") == {b"1" * 8, b"2" * 8, b"3" * 8}
    assert trained_rows(tmp_path / "first" / "adapter") == {b"1" * 8, b"2" * 8}
    assert trained_rows(tmp_path / "second") is None


BAD: dict[str, tuple[list[str], str]] = {
    "nothing": (["--data", "CHATS"], "no model; pass an ADAPTER"),
    "no data": (["ONE"], "nothing to evaluate on; use --data"),
    "gate without data": (["ONE", "--gate", "loss<1"], "--gate loss<1 needs held-out data; add --data"),
    "unknown gate": (["ONE", "--data", "CHATS", "--gate", "lss<1"], "did you mean loss"),
    "metric": (["ONE", "--data", "CHATS", "--metric", "exact_mach"], "did you mean exact_match"),
    "old spelling": (["ONE", "--data", "CHATS", "--metrics", "loss"], "Use --metric"),
    "no function": (["ONE", "--data", "CHATS", "--metric", "absent.py:f"], "no such file: absent.py"),
    "no prompts": (["ONE", "--data", "TEXTS", "--metric", "exact_match"], "no prompt with one reply; use --metric"),
    "change": (["ONE", "--data", "CHATS", "--no-base", "--gate", "loss_change<0"], "remove --no-base"),
    "no choices": (
        ["ONE", "--data", "CHATS", "--gate", "acc>.5"],
        "accuracy needs choices, but its rows were read as mess",
    ),
    "whole and base": (["BASE", "--model", "BASE", "--data", "CHATS"], "is a full model"),
    "bad rows": (["ONE", "--data", "BAD"], "bad.jsonl:2: answer 'purple' matches no choice"),
    "other base": (["ONE", "--model", "OTHER", "--data", "CHATS"], "base"),
}


@pytest.mark.parametrize(("tokens", "hint"), BAD.values(), ids=BAD)
def test_mistakes_exit_with_2(tokens: list[str], hint: str, adapter: Path, tiny_model: Path, chats: Path) -> None:
    bad = chats.with_name("bad.jsonl")
    rows = [QUIZ[0], {**QUIZ[1], "answer": "purple"}, {**QUIZ[2], "choices": ["red"]}]
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = chats.with_name("other")
    if "OTHER" in tokens:
        torch.manual_seed(5)
        model = chat_model(max_position_embeddings=512)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(other)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    texts = chats.with_name("texts.jsonl")
    texts.write_text(json.dumps({"text": "hello you"}) + "\n")
    places = {"ONE": adapter, "BASE": tiny_model, "CHATS": chats, "BAD": bad, "OTHER": other, "TEXTS": texts}
    check_refused(hint, "eval", *(places.get(token, token) for token in tokens))


def on_two_processes(way: str, *tokens: object) -> "subprocess.CompletedProcess[str]":
    words, python = [str(token) for token in tokens], [sys.executable, "-m"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tailora", "--", *words]
    command = torchrun if way == "torchrun" else ["tailora", *words, "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*python, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("way", ["tailora", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_two_processes_share_the_examples_and_print_one_result(
    way: str, adapter: Path, quiz: Path, tmp_path: Path
) -> None:
    tokens = ["eval", adapter, "--data", quiz, "--dtype", "float32", "--field", "prompt=question", "--json"]
    two = on_two_processes(way, *tokens, "--output-dir", tmp_path / "out")
    assert two.returncode == 0, two.stderr
    (line,) = two.stdout.splitlines()
    shared, alone = json.loads(line), found(*tokens[:-1])
    for part in ("metrics", "base", "change"):
        for name, one in alone[part].items():
            assert shared[part][name]["n"] == one["n"] == len(QUIZ)
            assert shared[part][name]["value"] == pytest.approx(one["value"], abs=1e-6)
            assert shared[part][name]["interval"] == pytest.approx(one["interval"], abs=1e-6)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == shared["metrics"]


@pytest.mark.ranks
@pytest.mark.slow
def test_all_processes_end_with_the_exit_code_of_an_unmet_gate(adapter: Path, chats: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tailora", "eval", adapter, "--data", chats, "--gate", "loss<0.001", "--no-base"]
    processes = [
        subprocess.Popen(
            [*map(str, command), "--device", "cpu"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [4, 4], outputs
    assert outputs[0].count("gate NOT MET: loss<0.001") == 1
    assert "gate" not in outputs[1].lower()


class Handler:
    """Handles signals as the program does, which ends at those of launchers unless it is about to say something."""

    is_ending = False

    def __call__(self, *_: object) -> None:
        if not self.is_ending:
            raise KeyboardInterrupt


@pytest.mark.parametrize("has_ranks", [True, False])
def test_a_launchers_signal_does_not_replace_the_exit_code_of_an_unmet_gate(
    has_ranks: bool, adapter: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes as soon as another process has ended with that code."""

    @contextmanager
    def ranks(_: str) -> Iterator[Any]:
        first = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device="cpu")
        yield first if has_ranks else None
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("tailora.train.setup.launched_ranks", ranks)
    before = signal.signal(signal.SIGTERM, Handler())
    try:
        tokens = ["eval", adapter, "--data", quiz, "--field", "prompt=question", "--gate", "accuracy>1", "--no-base"]
        assert call(*tokens)[0] == (4 if has_ranks else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_gate_that_is_not_met_and_a_mistake_have_their_exit_codes_on_two_processes(adapter: Path, quiz: Path) -> None:
    tokens = ["eval", adapter, "--data", quiz, "--field", "prompt=question", "--device", "cpu"]
    two = on_two_processes("tailora", *tokens, "--gate", "accuracy>1")
    assert two.returncode == 4, two.stderr
    assert two.stdout.count("gate NOT MET: accuracy>1") == 1
    assert "error" not in two.stderr
    two = on_two_processes("tailora", *tokens, "--dtype", "float8")
    assert two.returncode == 2
    assert two.stderr.count("error: ") == 1
    two = on_two_processes("tailora", *tokens, "--tasks", "arc_easy")
    assert two.returncode == 2
    assert "--tasks only supports a single process; start without --nproc-per-node" in two.stderr
