"""Scores of held-out data: without dropout, next to the base, and of the exact rows."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import write_rows
from tiny_vision import tiny_llava
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel
from tailora.errors import DataError
from tailora.evaluation import scores as scores_module
from tailora.evaluation.metrics import METRICS
from tailora.evaluation.scores import EvalOptions, Score, Scores, loss_on_data, score
from tailora.train.config import TrainConfig

QUIZ = [{"prompt": f"hello {n}", "choices": ["how are", "you today", "user"], "answer": n % 3} for n in range(6)]


@pytest.fixture
def tuned(tuned: LoRAModel) -> LoRAModel:
    """In training mode, with much dropout in the adapter and in the base's attention."""
    return tuned.train()


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "quiz.jsonl", QUIZ))


def reference_loss(model: LoRAModel, data: str, tokenizer: PreTrainedTokenizerFast) -> float:
    """Nats per token of the right replies and their end of turn, by transformers' logits in evaluation mode."""
    model.eval()
    nats, tokens = 0.0, 0
    for row in map(json.loads, Path(data).read_text().splitlines()):
        question = [{"role": "user", "content": row["prompt"]}]
        before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        reply = f"{row['choices'][row['answer']]}<|im_end|>"
        context, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, reply))
        with torch.no_grad():
            logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        tokens += len(ids)
    return nats / tokens


@pytest.mark.slow
def test_every_metric_is_computed_in_evaluation_mode(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, quiz: str
) -> None:
    options = EvalOptions(metrics=tuple(METRICS), max_new_tokens=6)
    scores = score(tuned, tokenizer, quiz, options)
    assert all(module.training for module in tuned.modules())
    assert score(tuned, tokenizer, quiz, options) == scores  # dropout would differ
    assert score(tuned.eval(), tokenizer, quiz, options) == scores
    assert scores.metrics["loss"].value == pytest.approx(reference_loss(tuned, quiz, tokenizer), rel=1e-5)
    with tuned.disable_adapter():
        assert scores.base is not None
        assert scores.base["loss"].value == pytest.approx(reference_loss(tuned, quiz, tokenizer), rel=1e-5)


def test_the_loss_on_pairs_of_replies_is_that_of_the_chosen_ones(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"

    def loss(rows: list[dict[str, Any]]) -> float:
        write_rows(path, rows)
        return loss_on_data(TrainConfig(data=str(path)), tuned, tokenizer, notes.append)().loss

    notes: list[str] = []
    single = [{"prompt": f"hello {number}", "completion": "you today"} for number in range(3)]
    expected = loss(single)
    assert not [note for note in notes if "chosen" in note]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "user"} for row in single]
    assert loss(pairs) == pytest.approx(expected, rel=1e-6)
    assert "evaluating only the chosen replies of the pairs, with the language modeling loss" in notes
    with pytest.raises(DataError, match="single replies with a label cannot be evaluated"):
        loss([{**row, "label": True} for row in single])


def test_copies_of_a_row_are_no_further_examples(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": f"hello {number}", "completion": "you today"} for number in range(3)]
    paths = {"once": rows, "copied": [*rows, *rows[1:], rows[2], rows[2]]}
    scores, losses = {}, {}
    for name, content in paths.items():
        path = tmp_path / f"{name}.jsonl"
        write_rows(path, content)
        scores[name] = score(tuned, tokenizer, str(path))
        losses[name] = loss_on_data(TrainConfig(data=str(path)), tuned, tokenizer, lambda _: None)().sums.tolist()
    assert scores["copied"].metrics == scores["once"].metrics
    assert scores["copied"].change == scores["once"].change
    assert scores["copied"].data is not None
    assert scores["once"].data is not None
    assert (scores["copied"].data.rows, scores["copied"].data.copies) == (7, 4)
    assert scores["copied"].data.supervised_tokens == scores["once"].data.supervised_tokens
    assert losses["copied"] == losses["once"]


def test_questions_that_differ_in_a_wrong_choice_are_no_copies(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "quiz.jsonl"
    rows = [{**QUIZ[0], "choices": ["how are", wrong]} for wrong in ("user", "you", "user")]
    write_rows(path, rows)
    assert score(tuned, tokenizer, str(path)).metrics["accuracy"].n == 2


@pytest.mark.slow
def test_chunks_of_a_stream_give_what_one_batch_gives(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"hello {n}", "completion": "you"}) + "\n" for n in range(150)))
    adapted = LoRAModel(model, LoRAConfig(r=2))
    steps: list[tuple[int, int]] = []
    result = score(adapted, tokenizer, str(path), EvalOptions(("loss",)), progress=lambda *step: steps.append(step))
    assert result.metrics["loss"].n == 150
    assert steps == [(64, 300), (128, 300), (192, 300), (256, 300), (278, 300), (300, 300)]
    assert result.metrics["loss"].value == pytest.approx(result.base["loss"].value)  # type: ignore[index]
    assert adapted.active_adapters == ("default",)


def test_scores_become_json_without_nan_and_are_merged() -> None:
    one = Scores({"loss": Score(1.0, float("nan"), float("nan"), 1)}, None, None)
    other = Scores({"t/acc": Score(float("inf"), 0.0, 1.0, 2)}, None, None, tasks={"lm_eval": "0"})
    assert one.merge(other).to_dict() == {
        "metrics": {
            "loss": {"value": 1.0, "interval": None, "n": 1},
            "t/acc": {"value": None, "interval": [0.0, 1.0], "n": 2},
        },
        "base": None,
        "change": None,
        "data": None,
        "tasks": {"lm_eval": "0"},
        "labels": None,
        "answers": [],
    }


def test_a_change_is_from_the_base_to_the_adapter_and_perplexity_is_the_exponential_of_the_loss() -> None:
    base, tuned = (
        scores_module._Totals(losses={number: (nats, 2) for number, nats in enumerate(of_examples)})
        for of_examples in ([4.0, 5.0, 6.0, 5.0], [3.0, 4.5, 5.0, 4.0])
    )
    facts: Any = None  # used in messages only
    loss, perplexity = (scores_module._score(name, tuned, facts) for name in ("loss", "perplexity"))
    change = scores_module._change("loss", base, tuned)
    assert loss.value == pytest.approx(16.5 / 8)
    assert change.value == pytest.approx((16.5 - 20) / 8)
    assert change.low < change.high < 0
    ends = (perplexity.value, perplexity.low, perplexity.high)
    assert ends == pytest.approx(tuple(map(math.exp, (loss.value, loss.low, loss.high))))
    tuned.hits["accuracy"], base.hits["accuracy"] = [True, True, False], [True, False, False]
    assert scores_module._change("accuracy", base, tuned).value == pytest.approx(1 / 3)


def test_examples_are_no_longer_than_the_positions_of_the_model(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, quiz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def settings(*_: Any, max_length: int, **__: Any) -> None:
        lengths.append(max_length)
        raise InterruptedError

    monkeypatch.setattr(scores_module, "DataSettings", settings)
    for asked in (1024, 100):
        with pytest.raises(InterruptedError):
            score(tuned, tokenizer, quiz, EvalOptions(max_length=asked))
    model, processor = tiny_llava()
    model.config.text_config.max_position_embeddings = 77
    with pytest.raises(InterruptedError):
        score(LoRAModel(model), processor, quiz)
    assert lengths == [256, 100, 77]


@pytest.mark.parametrize("world", [2, pytest.param(7, marks=pytest.mark.exhaustive)])  # of 7 one has no example
def test_ranks_that_share_the_examples_get_the_scores_of_one_process(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, quiz: str, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(scores_module, "CHUNK", 1)  # several chunks, the last one short
    options = EvalOptions(metrics=tuple(METRICS), max_new_tokens=2)
    one = score(tuned, tokenizer, quiz, options)
    shares: list[Any] = []

    def gather(own: list[Any]) -> Any:
        """Of the last rank alone: by then all shares are there."""
        shares.extend(own)
        if len(shares) < world:
            raise InterruptedError
        return shares

    monkeypatch.setattr(scores_module, "gather_object", gather)
    for rank in range(world):
        ranks: Any = SimpleNamespace(process_index=rank, num_processes=world)
        with pytest.raises(InterruptedError) if rank < world - 1 else nullcontext():
            shared = score(tuned, tokenizer, quiz, options, ranks=ranks)
    assert shared == one
