"""Training on labels: the losses are those of transformers, of every kind of head and model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, word_tokenizer
from tiny_run import write_rows
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tailora import LoRAConfig, LoRAModel
from tailora.core.patterns import inside
from tailora.core.targets import missing_pooler
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.labels import Labels
from tailora.errors import ConfigError, FormatError
from tailora.kernels.loss import HEAD
from tailora.train.classification import class_weights, label_task
from tailora.train.config import TrainConfig
from tailora.train.loss import BatchLayout, Evaluation, evaluate, make_batch
from tailora.train.model_loading import fitted_labels, labels_of_adapter, load_base, read_config
from tailora.train.trainer import run

SINGLE = Labels("sequence-classification", ("a", "b", "c"))
SEVERAL = Labels("sequence-classification", ("a", "b", "c"), several=True)
NUMBER = Labels("regression", ("value",))
TAGS = Labels("token-classification", ("O", "B-X", "I-X"))
LENGTHS = (9, 4, 6)
OTHERS = ("Roberta", "DebertaV2", "ModernBert", "Qwen2")
LAYOUT = BatchLayout(packed=False, loss=HEAD, pad_id=0)


def examples_of(labels: Labels) -> Examples:
    random = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        ids = random.integers(3, 80, length).astype(np.int32)
        tags = np.full(length, IGNORED, dtype=np.int32)
        target = None
        if labels is TAGS:
            tags[::2] = random.integers(0, 3, len(tags[::2]))
        elif labels is SEVERAL:
            target = random.integers(0, 2, 3).astype(np.float64)
        else:
            target = np.array([float(random.integers(0, 3))])
        examples.append(Example(ids, tags, target=target))
    return Examples.of(examples)


def model_of(name: str, labels: Labels) -> Any:
    class_name = f"{name}For{'Token' if labels is TAGS else 'Sequence'}Classification"
    model = tiny_model(class_name, num_labels=len(labels.names), problem_type=labels.problem_type)
    model.config.pad_token_id = 0
    return model.eval()


def own_loss(model: Any, labels: Labels, example: Example) -> float:
    """What transformers computes for one row."""
    target = torch.from_numpy(example.labels.astype(np.int64))
    if example.target is not None:
        target = torch.tensor(example.target, dtype=torch.int64 if labels is SINGLE else torch.float32)
        target = target[None] if labels is SEVERAL else target
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    return float(model(input_ids=ids, labels=target if example.target is not None else target[None]).loss)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL, NUMBER, TAGS], ids=["single", "several", "number", "tags"])
@pytest.mark.parametrize(
    "name", ["Bert", "Llama", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)]
)
def test_padded_losses_are_those_of_transformers(name: str, labels: Labels) -> None:
    model, examples, task = model_of(name, labels), examples_of(labels), label_task(labels)
    with torch.no_grad():
        batch = task.make_batch([*examples], LAYOUT)
        losses = task.outputs(model, batch, LAYOUT).losses.numpy()
        by_row = np.bincount(batch.owners, weights=losses) / task.counts(examples)
        expected = [own_loss(model, labels, example) for example in examples]
    np.testing.assert_allclose(by_row, expected, rtol=1e-4)


@pytest.mark.parametrize("labels", [SINGLE, TAGS], ids=["classes", "tags"])
def test_class_weights_divide_as_in_torch(labels: Labels) -> None:
    weights = np.array([0.5, 3.0, 2.0])
    model, examples = model_of("Bert", labels), examples_of(labels)
    task, plain = label_task(labels, weights), label_task(labels)
    with torch.no_grad():
        batch = task.make_batch([*examples], LAYOUT)
        outputs = task.outputs(model, batch, LAYOUT)
        assert outputs.scores is not None
        expected = F.cross_entropy(outputs.scores, batch.targets, weight=torch.tensor(weights, dtype=torch.float32))
        before = plain.outputs(model, batch, LAYOUT).losses
    divisor = sum(task.divisor(example) for example in examples)
    assert batch.loss_weights is not None
    torch.testing.assert_close((outputs.losses * batch.loss_weights).sum() / divisor, expected)
    torch.testing.assert_close(outputs.losses, before)  # evaluations are not weighted


def test_weights_of_rows_and_classes_are_multiplied() -> None:
    task = label_task(SINGLE, np.array([0.5, 3.0, 2.0]))
    rows = [replace(example, weight=weight) for example, weight in zip(examples_of(SINGLE), (1, 2, 3), strict=True)]
    batch = make_batch(rows, LAYOUT, torch.device("cpu"), task)
    classes = [int(row.target[0]) for row in rows if row.target is not None]
    expected = [row.weight * task.weights_of(np.array([i]))[0] for row, i in zip(rows, classes, strict=True)]
    assert batch.loss_weights is not None
    assert batch.loss_weights.tolist() == expected


def test_hits_are_right_predictions() -> None:
    examples = examples_of(TAGS)
    task = label_task(TAGS)
    classes = task.right_classes(examples)
    scores = np.eye(3)[classes]
    scores[0] = np.roll(scores[0], 1)
    evaluation = task.evaluation(examples, np.zeros(len(examples)), scores)
    hits = task.hits(examples, evaluation)
    assert hits is not None
    np.testing.assert_array_equal(hits, task.counts(examples) - [1, 0, 0])
    assert label_task(NUMBER).hits(examples_of(NUMBER), evaluation) is None


def test_balanced_weights_count_every_class_alike() -> None:
    weights = class_weights("balanced", SINGLE, {"a": 10, "b": 30, "c": 20})
    assert weights is not None
    np.testing.assert_allclose(weights * [10, 30, 20], 20)
    np.testing.assert_array_equal(class_weights({"b": 4}, SINGLE, {}), [1, 4, 1])
    with pytest.raises(ConfigError, match="labels are a, b, c"):
        class_weights({"d": 4}, SINGLE, {})


def test_segments_of_two_texts_are_told_apart() -> None:
    task = label_task(SINGLE)
    ids = np.arange(3, 9, dtype=np.int32)
    pair = Example(ids, np.full(6, IGNORED, np.int32), second_start=4, target=np.zeros(1))
    single = Example(ids[:3], np.full(3, IGNORED, np.int32), target=np.zeros(1))
    batch = task.make_batch([pair, single], LAYOUT)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert "token_type_ids" not in task.make_batch([single], LAYOUT).inputs


def test_evaluations_keep_the_outputs_in_the_order_of_the_examples() -> None:
    model, examples, task = model_of("Bert", TAGS), examples_of(TAGS), label_task(TAGS)
    wrapped = LoRAModel(model)
    whole = evaluate(wrapped, examples, layout=LAYOUT, token_budget=1000, task=task)
    apart = [
        evaluate(wrapped, Examples.of([example]), layout=LAYOUT, token_budget=1, task=task) for example in examples
    ]
    np.testing.assert_allclose(whole.scores, np.concatenate([each.scores for each in apart]), atol=1e-5)
    np.testing.assert_allclose(whole.sums, np.concatenate([each.sums for each in apart]), rtol=1e-4)


# ---- Runs

GOOD, BAD = ["great", "lovely", "brilliant", "fine"], ["awful", "dull", "boring", "poor"]
ROWS = [
    {"text": f"a {word} film and a {words[number % 4]} plot {number % 3}", "label": label}
    for number in range(10)
    for words, label in ((GOOD, "positive"), (BAD, "negative"))
    for word in words[:2]
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    word_tokenizer(row["text"] for row in ROWS).save_pretrained(folder)
    tiny_model("BertModel", vocab_size=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def settings(model: Path, data: Path, folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "task": "sequence-classification",
        "model": str(model),
        "data": str(data),
        "output_dir": str(folder),
        "max_steps": 20,
        "learning_rate": 1e-2,
        "validation_split": 0.3,
        "dtype": "float32",
    }
    return TrainConfig(**{**values, **changes})


def assert_others_load(result: Any, base: Path, labels: Labels) -> dict[str, Any]:
    """PEFT, and a new LoRAModel, compute from the saved adapter what the trained model does; returns its config."""
    assert result.after.loss < result.before.loss
    folder = Path(result.output_dir) / "adapter"
    assert labels_of_adapter(folder) == labels
    auto_class = AutoModelForTokenClassification if labels.task == TAGS.task else AutoModelForSequenceClassification
    theirs = PeftModel.from_pretrained(auto_class.from_pretrained(base, num_labels=len(labels.names)), folder)
    loaded, _ = load_base(str(base), "float32", labels=labels, seed=5)  # the adapter brings its head
    ours = LoRAModel.from_pretrained(loaded, folder)
    inputs = result.tokenizer("a fine film", return_tensors="pt")
    with torch.no_grad():
        expected = result.model.eval()(**inputs).logits
        for model in (theirs.eval(), ours.eval()):
            torch.testing.assert_close(model(**inputs).logits, expected)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
@pytest.mark.slow
def test_peft_computes_what_the_trained_model_does(encoder: Path, data: Path, tmp_path: Path) -> None:
    result = run(settings(encoder, data, tmp_path / "run"))
    config = assert_others_load(result, encoder, Labels("sequence-classification", ("negative", "positive")))
    assert config["task_type"] == "SEQ_CLS"


def head_of(folder: Path, labels: Labels, seed: int = 0) -> torch.Tensor:
    weight: torch.Tensor = load_base(str(folder), "float32", labels=labels, seed=seed)[0].classifier.weight
    return weight


@pytest.mark.slow
def test_a_trained_head_for_the_same_labels_is_kept(encoder: Path, data: Path, tmp_path: Path) -> None:
    full = run(settings(encoder, data, tmp_path / "full", method="full", learning_rate=1e-3, max_steps=10))
    model = tmp_path / "full" / "model"
    again = run(settings(model, data, tmp_path / "again", max_steps=1))
    assert full.after is not None
    assert again.before is not None
    np.testing.assert_allclose(again.before.loss, full.after.loss, rtol=1e-4)
    rows = [{**row, "label": row["label"] == "positive"} for row in ROWS]
    other = write_rows(tmp_path / "other.jsonl", rows)
    renamed = run(settings(model, other, tmp_path / "renamed", max_steps=1))
    assert renamed.model.config.id2label == {0: "false", 1: "true"}
    assert not torch.equal(renamed.model.base_model.classifier.weight, again.model.base_model.classifier.weight)


def test_a_head_knows_more_labels_than_the_data_in_its_own_order(tmp_path: Path) -> None:
    names = {0: "y", 1: "x", 2: "z"}
    model = tiny_model("BertForSequenceClassification", vocab_size=300, id2label=names)
    model.save_pretrained(tmp_path)
    config = read_config(str(tmp_path))
    data = Labels("sequence-classification", ("x", "y"))
    assert fitted_labels(data, config).names == ("y", "x", "z")
    for other in (replace(data, names=("x", "w")), replace(data, several=True), TAGS):
        assert fitted_labels(other, config) == other


def test_a_head_for_other_labels_is_made_anew_with_the_seed(encoder: Path, tmp_path: Path) -> None:
    model = tiny_model("BertForSequenceClassification", vocab_size=300, id2label={0: "x", 1: "y", 2: "z"})
    model.save_pretrained(tmp_path)
    word_tokenizer(row["text"] for row in ROWS).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    kept, new = head_of(tmp_path, replace(SINGLE, names=("x", "y", "z"))), head_of(tmp_path, SINGLE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(kept, model.classifier.weight)
    assert not torch.equal(new, kept)
    torch.rand(1)
    assert torch.equal(new, head_of(tmp_path, SINGLE))
    assert not torch.equal(new, head_of(tmp_path, SINGLE, seed=1))
    assert not torch.equal(head_of(encoder, SINGLE), head_of(encoder, SINGLE, seed=1))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
@pytest.mark.slow
def test_tags_are_learned_by_an_encoder(encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["a", word, "film"], "tags": ["O", "B-GOOD" if word in GOOD else "B-BAD", "O"]}
        for word in GOOD + BAD
        for _ in range(3)
    ]
    path = write_rows(tmp_path / "tags.jsonl", rows)
    result = run(settings(encoder, path, tmp_path / "run", task="token-classification", eval_data=str(path)))
    assert_others_load(result, encoder, Labels("token-classification", ("O", "B-BAD", "B-GOOD")))


def test_weights_that_are_no_head_must_be_in_the_files(tmp_path: Path) -> None:
    model = tiny_model("BertModel", vocab_size=300)
    tensors = {name: value for name, value in model.state_dict().items() if "pooler.dense.bias" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    word_tokenizer(row["text"] for row in ROWS).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 1 weights .*pooler\.dense\.bias"):
        load_base(str(tmp_path), labels=SINGLE)


@pytest.fixture(scope="module", params=["Bert", pytest.param("Albert", marks=pytest.mark.exhaustive)])
def masked_words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was pretrained for masked words alone: its files have no pooler."""
    folder = tmp_path_factory.mktemp("masked")
    word_tokenizer(row["text"] for row in ROWS).save_pretrained(folder)
    tiny_model(f"{request.param}ForMaskedLM", vocab_size=300).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
@pytest.mark.slow
def test_a_pooler_that_the_files_lack_is_trained_and_saved_with_the_head(
    masked_words: Path, data: Path, tmp_path: Path
) -> None:
    result = run(settings(masked_words, data, tmp_path / "run", learning_rate=3e-3))  # at 1e-2, Albert stays at chance
    (path,) = missing_pooler(result.model.base_model)
    assert sorted(result.model.adapter().saved) == [path, "classifier"]
    assert not any(inside(layer, path) for layer in result.model.adapter().low_rank)
    config = assert_others_load(result, masked_words, Labels("sequence-classification", ("negative", "positive")))
    assert sorted(config["modules_to_save"]) == [path, "classifier"]


def test_an_adapter_without_the_pooler_that_its_base_lacks_is_refused(masked_words: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(masked_words, num_labels=3)
    LoRAModel(base, LoRAConfig(task_type="SEQ_CLS")).save_adapter(tmp_path / "adapter")
    loaded, _ = load_base(str(masked_words), "float32", labels=SINGLE)
    with pytest.raises(FormatError, match=r"missing (al)?bert\.pooler, which the base model's files lack as well"):
        LoRAModel.from_pretrained(loaded, tmp_path / "adapter")


def test_several_labels_are_right_if_all_of_them_are() -> None:
    targets = [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    ids = np.array([1, 2], np.int32)
    examples = Examples.of(replace(Example.of_text(ids), target=np.array(target)) for target in targets)
    scores = np.array([[2.0, -1.0, 3.0], [2.0, 1.0, 3.0], [-1.0, -1.0, -1.0]])
    hits = label_task(SEVERAL).hits(examples, Evaluation(np.zeros(3), np.ones(3, np.int64), scores))
    assert hits is not None
    assert hits.tolist() == [1.0, 0.0, 1.0]
