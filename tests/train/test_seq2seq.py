"""Sequence to sequence: the losses are those of transformers, and a trained adapter answers in every command."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from command_line import found
from tiny import tiny_model, word_tokenizer
from tiny_run import write_rows
from transformers import PreTrainedTokenizerFast

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED
from tailora.data.samples import Pair
from tailora.data.tokenize import EncodedSample, encode_samples
from tailora.kernels.loss import HEAD
from tailora.train.loss import SEQ2SEQ_TASK, BatchLayout
from tailora.train.step import Step

WORDS = ["red", "green", "blue", "white"]
ROWS = [{"prompt": f"say {a} then {b}", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
IDS = {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "bos_token_id": 2}


def tokenizer_of_rows() -> PreTrainedTokenizerFast:
    return word_tokenizer(f"{row['prompt']} {row['completion']}" for row in ROWS)


def samples(*pairs: Pair, **settings: Any) -> list[EncodedSample]:
    pairs = pairs or (Pair("say red", "red"), Pair("say green then blue", "blue green red"))
    tokenizer = ChatTokenizer.of(tokenizer_of_rows(), DataSettings(task="seq2seq", **settings))
    return [sample for (sample,) in cast(list[list[EncodedSample]], encode_samples(pairs, tokenizer))]


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_padded_losses_are_those_of_transformers(name: str) -> None:
    model = tiny_model(name, vocab_size=300, **IDS).eval()
    examples = [sample.example for sample in samples()]
    layout = BatchLayout(packed=False, loss=HEAD, pad_id=0)
    with torch.no_grad():
        batch = SEQ2SEQ_TASK.make_batch(examples, layout)
        losses = SEQ2SEQ_TASK.outputs(model, batch, layout).losses
        for index, example in enumerate(examples):
            source, target = (torch.from_numpy(part.input_ids.astype(np.int64))[None] for part in example.sequences)
            expected = model(input_ids=source, labels=target).loss
            torch.testing.assert_close(losses[torch.from_numpy(batch.owners == index)].mean(), expected)
            assert SEQ2SEQ_TASK.divisor(example) == target.numel()


def test_every_token_of_the_target_counts_as_trained() -> None:
    examples = [sample.example for sample in samples()]
    step = Step.of([], examples, SEQ2SEQ_TASK)
    assert step.supervised == step.divisor == sum(len(example.sequences[1].input_ids) for example in examples)


def test_a_cut_keeps_the_token_that_ends_the_text() -> None:
    (result,) = samples(Pair("say green then blue", "blue green"), max_length=4)
    source, target = result.example.sequences
    assert result.length > 4
    for part in (source, target):
        assert len(part.input_ids) == 4
        assert part.input_ids[-1] == tokenizer_of_rows().sep_token_id
    assert (source.labels == IGNORED).all()
    np.testing.assert_array_equal(target.labels, target.input_ids)


@pytest.mark.slow
def test_a_trained_adapter_is_evaluated_and_answers(tmp_path: Path) -> None:
    model, data, run = tmp_path / "model", write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    tokenizer = tokenizer_of_rows()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(model)
    tiny_model("BartForConditionalGeneration", vocab_size=300, forced_eos_token_id=None, **IDS).save_pretrained(model)
    settings = ["--validation-split", 0.3, "--learning-rate", 1e-2, "--max-steps", 8, "--samples", 1]
    trained = found("train", "--task", "seq2seq", "--model", model, "--data", data, *settings, "--output-dir", run)
    data_of_eval = ["--data", data, "--limit", 8]
    scores = found("eval", run, *data_of_eval, "--metric", "loss", "--metric", "exact_match", "--max-new-tokens", 4)
    predictions = found("predict", run, "--data", data, "--limit", 2, "--max-new-tokens", 4)
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    assert scores["change"]["loss"]["value"] < 0
    assert "exact_match" in scores["metrics"]
    assert [len(row["messages"]) for row in predictions["predictions"]] == [1, 1]
    settings_of_adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings_of_adapter["task_type"] == "SEQ_2_SEQ_LM"
