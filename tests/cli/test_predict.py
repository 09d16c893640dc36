"""Labels from the command line: train, eval, predict, and what is wrong with data; answers of language models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import call, check_refused, found
from tiny import chat_tokenizer, word_tokenizer
from tiny import tiny_model as random_model
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.predict import ChatOptions, Question, read_question
from tailora.data.chat_template import ChatTokenizer
from tailora.data.readers import Row
from tailora.formats.run_folder import write_system_message
from tailora.train.model_loading import labels_of_adapter

WORDS = {"positive": ["great", "lovely", "fine"], "negative": ["awful", "dull", "poor"]}
ROWS = [
    {"text": f"a {word} film and a {other} plot", "label": label}
    for label, words in WORDS.items()
    for word in words
    for other in words
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds model, rows.jsonl, and run: an adapter for two labels."""
    folder = tmp_path_factory.mktemp("labels")
    word_tokenizer(row["text"] for row in ROWS).save_pretrained(folder / "model")
    random_model("BertModel", vocab_size=300).save_pretrained(folder / "model")
    write(folder / "rows.jsonl", ROWS)
    code, out, err = call(*training(folder), "--output-dir", folder / "run", "--max-steps", 20, "--json")
    assert code == 0, err
    (folder / "result.json").write_text(out.splitlines()[-1])
    return folder


def training(folder: Path, task: str = "sequence-classification", data: Path | None = None) -> list[object]:
    settings = ["--validation-split", 0.3, "--learning-rate", 1e-2]
    return ["train", "--task", task, "--model", folder / "model", "--data", data or folder / "rows.jsonl", *settings]


@pytest.mark.slow
def test_train_says_the_accuracy_before_and_after(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["eval_accuracy_before"] <= 1
    assert result["eval_accuracy_after"] > 0.6
    report = json.loads((folder / "run" / "report.json").read_text())
    assert "new, randomly initialized head" in report["verdict"]
    assert "always predicting" in report["verdict"]
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 21)]
    page = (folder / "run" / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "calibration" in page


def test_a_verdict_opens_with_the_most_frequent_label_if_training_does_not_beat_it(
    folder: Path, tmp_path: Path
) -> None:
    line = [*training(folder)[:-1], 1e-9, "--max-steps", 1, "--output-dir", tmp_path / "run"]
    assert call(*line)[0] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    share = report["labels"]["majority"]["share"]
    assert report["result"]["eval_accuracy_after"] <= share
    assert re.match(rf"Accuracy is .*(below|no better than) the {share:.1%} for always predicting ", report["verdict"])
    assert "held-out examples" in report["verdict"]


@pytest.mark.slow
def test_eval_gives_scores_with_intervals_and_gates(folder: Path) -> None:
    code, out, err = call("eval", folder / "run", "--data", folder / "rows.jsonl", "--json", "--gate", "f1[positive]>2")
    assert code == 4, err
    scores = json.loads(out.splitlines()[-1])
    assert {"loss", "accuracy", "f1_macro", "mcc", "auroc", "f1[positive]"} <= scores["metrics"].keys()
    assert scores["metrics"]["accuracy"]["interval"] is not None
    assert scores["base"] is None  # its head would be random
    assert sum(map(sum, scores["labels"]["confusion"])) == len(ROWS)
    assert "no head for these labels" in err


def test_a_gate_on_a_change_is_refused_where_the_base_has_no_head(folder: Path) -> None:
    line = ["eval", folder / "run", "--data", folder / "rows.jsonl", "--gate", "accuracy_change>0"]
    check_refused("has no head for these labels, so there is nothing to compare", *line)


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_a_system_message_is_refused_for_labels(command: str, folder: Path) -> None:
    hint = "--system is for language models, but this model is for sequence-classification; remove --system"
    check_refused(hint, command, folder / "run", "--data", folder / "rows.jsonl", "--system", "be brief")


def test_a_question_has_the_tools_of_its_row_and_no_images() -> None:
    tokenizer = ChatTokenizer.of(chat_tokenizer(["a"]))
    fields = {"prompt": "Rain?", "tools": '[{"name": "weather", "parameters": {}}]', "images": "[]"}
    question = read_question(Row("rows.csv", 1, fields), ChatOptions(), tokenizer)
    assert isinstance(question, Question)
    assert '"name": "weather"' in question.asked[0]["content"]  # the template supports no tools
    with_image = read_question(Row("rows.csv", 1, {"prompt": "What?", "images": ["a.png"]}), ChatOptions(), tokenizer)
    assert "images: predict does not support images" in str(with_image)


@pytest.mark.parametrize(
    ("flag", "name"), [("--metric", "pearson"), ("--gate", "f1"), ("--gate", "f1_change"), ("--gate", "f1[absent]")]
)
def test_eval_names_a_score_that_there_is_not_before_it_loads_the_model(
    flag: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.cli.eval.load_model", None)
    if name.endswith("_change"):
        with_head = labels_of_adapter(folder / "run")
        monkeypatch.setattr("tailora.train.model_loading.labels_of_config", lambda _: with_head)
    hint = f"unknown score {name.removesuffix('_change')} for sequence-classification; available: loss, accuracy"
    value = f"{name}>0.5" if flag == "--gate" else name
    check_refused(hint, "eval", folder / "run", "--data", folder / "rows.jsonl", flag, value)


@pytest.mark.slow
def test_predict_writes_labels_and_probabilities(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.cli.predict.CHUNK", 7)
    columns = {"number": 1, "share": float("nan"), "label": "unknown"}
    rows = write(tmp_path / "rows.jsonl", [{"text": row["text"], **columns} for row in ROWS])
    predictions = found("predict", folder / "run", rows)["predictions"]
    (one,) = found("predict", folder / "run", "--prompt", ROWS[0]["text"])["predictions"]
    assert one["label"] == predictions[0]["label"]
    assert [row["text"] for row in predictions] == [row["text"] for row in ROWS]
    for row in predictions:
        assert (row["number"], row["share"]) == (1, None)
        assert row["probabilities"].keys() == set(WORDS)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert all(value == float(f"{value:.6g}") for value in row["probabilities"].values())
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    renamed = write(tmp_path / "renamed.jsonl", [{"body": row["text"]} for row in ROWS])
    fields = ("--field", "text=body", "--field", "label=queue")  # of the training; there is no label here
    labels = [row["label"] for row in found("predict", folder / "run", "--data", renamed, *fields)["predictions"]]
    assert labels == [row["label"] for row in predictions]
    output = tmp_path / "predictions.jsonl"
    code, out, _ = call("predict", folder / "run", "--data", rows, "--output", output, "--limit", 3)
    assert (code, out) == (0, "")
    assert [json.loads(line)["label"] for line in output.read_text().splitlines()] == labels[:3]


@pytest.mark.parametrize(
    ("task", "row", "cause"),
    [
        ("sequence-classification", {"text": "a film", "label": None}, "label is empty"),
        ("sequence-classification", {"text": "a film", "label": "postive"}, "'postive'"),
        ("regression", {"text": "a film", "label": "much"}, "expected a number"),
        ("token-classification", {"tokens": ["a"], "tags": []}, "tags: expected a list"),
    ],
)
def test_wrong_rows_end_with_code_2(task: str, row: dict[str, Any], cause: str, folder: Path, tmp_path: Path) -> None:
    good = {"tokens": ["a", "b"], "tags": ["O", "B-X"]} if task == "token-classification" else ROWS[0]
    if task == "regression":
        good = {**ROWS[0], "label": 1}
    rows = write(tmp_path / "rows.jsonl", [*ROWS, row] if task == "sequence-classification" else [good, good, row])
    train = [*training(folder, task, write(tmp_path / "good.jsonl", ROWS)), "--eval-data", rows]
    if cause != "'postive'":
        train = training(folder, task, rows)
    assert "rows.jsonl" in check_refused(cause, *train, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_shows_the_labels(folder: Path) -> None:
    code, out, _ = call(
        "data", folder / "rows.jsonl", "--task", "sequence-classification", "--model", folder / "model", "--rows", 1
    )
    assert code == 0
    assert "[[ -> positive]]" in out or "[[ -> negative]]" in out
    assert re.search(r"labels +negative \d+, positive \d+", out)
    assert "--task sequence-classification" in out.splitlines()[-1]


@pytest.mark.slow
def test_plan_reads_the_labels(folder: Path) -> None:
    line = ["--task", "sequence-classification", "--model", folder / "model"]
    assert found("plan", *line, "--data", folder / "rows.jsonl")["memory"]
    check_refused("--data", "plan", *line)


@pytest.mark.slow
def test_a_language_model_answers_rows(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    code, out, _ = call("predict", "--model", tiny_model, "--data", chats, "--limit", 2, "--max-new-tokens", 3)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["messages"][-1]["role"] for line in lines] == ["user", "user"]
    assert all(isinstance(line["answer"], str) for line in lines)
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "Hi", "id": 7}])
    code, out, _ = call("predict", "--model", tiny_model, "--data", rows, "--max-new-tokens", 3)
    assert code == 0
    assert json.loads(out)["id"] == 7
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, {"question": "Hi"}])
    check_refused(
        "rows.jsonl:2: expected a column messages or prompt", "predict", "--model", tiny_model, "--data", rows
    )


def test_answers_get_the_system_message_that_the_run_trained_with(tiny_model: Path, tmp_path: Path) -> None:
    model = LoRAModel(LlamaForCausalLM.from_pretrained(tiny_model), LoRAConfig(r=2))
    model.save_adapter(tmp_path / "run" / "adapter")
    write_system_message(tmp_path / "run" / "adapter", "be brief")
    own = {"role": "system", "content": "be loud"}
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, {"messages": [own, {"role": "user", "content": "Hi"}]}])

    def first_messages(*words: object) -> list[dict[str, str]]:
        code, out, err = call("predict", *words, "--data", rows, "--max-new-tokens", 1)
        assert code == 0, err
        return [json.loads(line)["messages"][0] for line in out.splitlines()]

    brief = {"role": "system", "content": "be brief"}
    assert first_messages(tmp_path / "run") == first_messages("--model", tiny_model, "--system", "be brief")
    assert first_messages(tmp_path / "run") == [brief, own]
    assert first_messages(tmp_path / "run" / "adapter", "--system", "x") == [brief | {"content": "x"}, own]


@pytest.mark.slow
def test_an_adapter_for_labels_is_shrunk_exported_and_inspected(folder: Path, tmp_path: Path) -> None:
    data = ["--data", folder / "rows.jsonl"]
    code, out, err = call("shrink", "--adapter", folder / "run", "--r", 2, "--output-dir", tmp_path / "small")
    assert code == 0, err
    assert f"tailora predict {tmp_path / 'small'} --model {folder / 'model'} --data ROWS.jsonl" in out
    assert call("eval", tmp_path / "small", *data)[0] == 0
    code, out, err = call("export", folder / "run", "--to", "merged", "--output", tmp_path / "merged")
    assert code == 0, err
    assert f"tailora predict --model {tmp_path / 'merged'} --data ROWS.jsonl" in out
    models = [folder / "run"], ["--model", tmp_path / "merged"]
    scores = [found("eval", *model, *data)["metrics"] for model in models]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    results = [found("predict", *model, *data, "--dtype", "float32")["predictions"] for model in models]
    positive, of_merged = ([row["probabilities"]["positive"] for row in predictions] for predictions in results)
    assert positive == pytest.approx(of_merged, abs=0.01)  # the files are in the base's precision
    code, out, err = call("inspect", folder / "run", "--model", folder / "model")
    assert code == 0, err
    assert "classifier" in out  # trained in full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (["inspect", "RUN", "--data", "ROWS"], "remove --data and --forgetting-data"),
        (["chat", "--adapter", "RUN"], "cannot generate text"),
        (
            ["predict", "RUN", "--prompt", "a", "--ignore-chat-template"],
            "are for language models, but this model is for",
        ),
        (["serve", "--adapter", "RUN"], "was trained for sequence-classification: it predicts labels and cannot"),
        (["export", "RUN", "--to", "gguf", "--output", "OUT"], "cannot export this adapter to gguf"),
        (["export", "RUN", "--to", "vllm", "--output", "OUT"], "--to vllm is for language models, but"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_an_adapter_for_labels_cannot_do_is_said(
    line: list[str], cause: str, folder: Path, tmp_path: Path
) -> None:
    places = {"RUN": folder / "run", "ROWS": folder / "rows.jsonl", "OUT": tmp_path / "out"}
    check_refused(cause, *(places.get(word, word) for word in line))
    assert not (tmp_path / "out").exists()
