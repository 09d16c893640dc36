"""Accumulation, packing and padding give one gradient; the science's own example of doing it wrong."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import token_losses
from tiny import GROUPED, chat_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from tailora.core.config import LoRAConfig
from tailora.data.collate import collate_packed, collate_padded
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import FORMS, FROZEN, OWN, RECOMPUTED
from tailora.model import LoRAModel
from tailora.train.kernel_choice import choose_layout
from tailora.train.loss import CAUSAL_LM, BatchLayout, ModelWithLoss, batches_within, evaluate, make_batch
from tailora.train.step import Step
from tailora.train.trainer import accumulate_gradients

CPU = torch.device("cpu")
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
}
PACKED, PADDED = (BatchLayout(packed, FROZEN, pad_id=0) for packed in (True, False))


def examples(lengths: tuple[int, ...] = (3, 5, 40, 60)) -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = random.integers(300, size=length).astype(np.int32)
        made.append(Example.of_text(ids, np.arange(length) >= length // 3))
    return made


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LoRAModel:
    torch.manual_seed(0)
    made = LoRAModel(AutoModelForCausalLM.from_config(CONFIGS[request.param]), LoRAConfig(r=4))
    for layer in made.lora_layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return made


def gradient(model: LoRAModel, batches: list[list[Example]], rows: BatchLayout) -> tuple[float, Tensor]:
    step = Step.of([], [example for batch in batches for example in batch], CAUSAL_LM)
    model.zero_grad()
    forward = ModelWithLoss(model, rows)
    made = [make_batch(batch, rows, CPU) for batch in batches]
    mean = accumulate_gradients(forward, made, step.divisor)
    return float(mean), torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])


@pytest.mark.parametrize("rows", [PACKED, PADDED], ids=["packed", "padded"])
def test_an_example_of_weight_2_counts_as_two(model: LoRAModel, rows: BatchLayout) -> None:
    data = examples()
    weighted = [replace(example, weight=weight) for example, weight in zip(data, (2, 1, 3, 0.5), strict=True)]
    repeated = [*data[:1] * 4, *data[1:2] * 2, *data[2:3] * 6, *data[3:]]
    with packed_rows(model.base_model) if rows.packed else nullcontext():
        (loss, one), (expected_loss, expected), (_, other) = (
            gradient(model, batches, rows) for batches in ([weighted[:3], weighted[3:]], [repeated], [data])
        )
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(one, other, rtol=0, atol=1e-4)


def test_the_loss_is_the_mean_over_all_tokens_and_not_the_mean_of_means(model: LoRAModel) -> None:
    data = examples()
    by_example = [token_losses(model, [example], PADDED)[0] for example in data]
    loss, _ = gradient(model, [[example] for example in data], PADDED)
    assert loss == pytest.approx(float(torch.cat(by_example).detach().mean()), abs=1e-6)
    assert abs(loss - float(torch.stack([losses.detach().mean() for losses in by_example]).mean())) > 1e-3


def test_a_batch_of_weight_zero_counts_for_nothing(model: LoRAModel) -> None:
    data = examples()
    _, expected = gradient(model, [data[:2]], PADDED)
    model.zero_grad()
    batches = [make_batch(data[:2], PADDED, CPU), replace(make_batch(data[2:], PADDED, CPU), weight=0.0)]
    supervised = sum(example.supervised for example in data[:2])
    accumulate_gradients(ModelWithLoss(model, PADDED), batches, supervised)
    again = torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])
    assert torch.equal(again, expected)


@pytest.mark.parametrize("form", [RECOMPUTED, OWN])
def test_logits_exist_at_supervised_positions_only(model: LoRAModel, form: str) -> None:
    rows: list[int] = []  # of the head's outputs
    head = model.base_model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.numel() // output.shape[-1]))
    with packed_rows(model.base_model):
        token_losses(model, examples(), BatchLayout(True, form, 0))
    assert rows[0] == sum(example.supervised for example in examples())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_losses_that_each_example_has_alone(model: LoRAModel, form: str, packed: bool) -> None:
    with packed_rows(model.base_model) if packed else nullcontext():
        losses, owners = token_losses(model, examples(), BatchLayout(packed, form, 0))
    for place, example in enumerate(examples()):
        logits = model(input_ids=torch.from_numpy(example.input_ids).long()[None]).logits[0, :-1]
        labels = torch.from_numpy(example.labels).long()[1:]
        alone = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100]
        torch.testing.assert_close(losses[owners == place], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fast", "form"), [("auto", FROZEN), ("off", OWN)])
def test_dropout_of_a_trained_adapter_does_not_change_what_is_chosen(
    settings: Any, model_folder: Path, fast: str, form: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = LoRAModel(base, LoRAConfig(r=4, lora_dropout=0.5)).train()
    for layer in model.lora_layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    notes: list[str] = []
    rows = choose_layout(settings(fast=fast), model, AutoTokenizer.from_pretrained(model_folder), notes.append)
    assert (rows.packed, rows.loss, notes) == (True, form, [])
    assert all(layer.training for layer in model.lora_layers.values())


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_switches_dropout_off_and_on_again(packed: bool) -> None:
    """In training mode it gives the losses of evaluation mode, though every forward would drop half of A's input."""
    model = LoRAModel(chat_model(initializer_range=0.2), LoRAConfig(r=4, lora_dropout=0.5))
    for layer in model.lora_layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    data = Examples.of(examples())
    expected = evaluate(model.eval(), data, layout=BatchLayout(packed, FROZEN, 0), token_budget=64)
    actual = evaluate(model.train(), data, layout=BatchLayout(packed, FROZEN, 0), token_budget=64)
    assert (actual.sums == expected.sums).all()
    assert all(layer.training for layer in model.lora_layers.values())


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_is_bitwise_repeatable_and_independent_of_its_batches(model: LoRAModel, packed: bool) -> None:
    """And of the weights of examples."""
    held = Examples.of(examples((3, 5, 40, 60, 7, 7, 21)))
    weighted = Examples.of(replace(example, weight=3.0) for example in held)
    model.train()
    first, second, small = (
        evaluate(model, data, layout=BatchLayout(packed, FROZEN, 0), token_budget=budget)
        for data, budget in ((held, 64), (weighted, 64), (held, 8))
    )
    assert (first.sums.tolist(), first.loss) == (second.sums.tolist(), second.loss)
    np.testing.assert_allclose(first.sums, small.sums, rtol=1e-5)
    assert (first.counts == held.supervised).all()
    assert model.training
    losses, owners = token_losses(model.eval(), list(held), PADDED)
    np.testing.assert_allclose(first.sums, np.bincount(owners, losses.detach().numpy()), rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_keeps_to_its_budget(packed: bool) -> None:
    lengths = np.array([5, 60, 7, 8, 30, 5, 5, 64])
    layout = replace(PADDED, packed=packed)
    batches = list(batches_within(64, texts(*lengths), layout))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        size = lengths[batch].sum() if packed else lengths[batch].max() * len(batch)
        assert size <= 64
    assert list(map(len, batches_within(64, texts(100), layout))) == [1]


def test_examples_with_the_same_beginning_share_a_batch() -> None:
    layout = BatchLayout(True, PADDED.loss, 0, shares_beginnings=True)
    ids = [[1, 2, 3, 4], [7, 8], [1, 2, 3, 5, 6], [7, 9, 9, 9, 9]]
    examples = Examples.of(Example.of_text(np.array(row, dtype=np.int32)) for row in ids)
    assert [sorted(batch.tolist()) for batch in batches_within(10, examples, layout)] == [[0, 2], [1, 3]]


def texts(*lengths: int) -> Examples:
    return Examples.of(Example.of_text(np.zeros(length, dtype=np.int32)) for length in lengths)


# ---- Batches of tensors

PAIR = [Example.of_text(np.array(ids, np.int32)) for ids in ([1, 2, 3], [4, 5])]


SYSTEM = np.arange(10, 18, dtype=np.int32)  # the beginning of each conversation


def conversations() -> list[Example]:
    """Returns documents that begin alike, two of them for longer, and one that is trained from its second token on."""
    made = examples((12, 20, 16))
    prompted = [Example.of_text(np.r_[SYSTEM, e.input_ids], np.r_[SYSTEM < 0, e.labels != IGNORED]) for e in made]
    longer = replace(prompted[1], input_ids=np.r_[prompted[1].input_ids[:-1], np.int32(7)])
    return [prompted[0], prompted[1], longer, prompted[2], Example.of_text(SYSTEM)]


def test_a_beginning_that_documents_share_is_in_the_row_once() -> None:
    documents = conversations()[:3]
    row = collate_packed(documents, share=True)
    longest = 8 + 20 // 3 - 1  # up to the first trained token
    assert row["input_ids"].numel() == 20 + (28 - 8) + (28 - longest)
    assert row["cu_seq_lens_q"].tolist() == [0, 20, 48, 76]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    whole = torch.cat([torch.from_numpy(document.input_ids) for document in documents])
    assert torch.equal(row["input_ids"][0][row["document_tokens"]], whole.long())
    assert torch.equal(whole[row["row_tokens"]].long(), row["input_ids"][0])
    assert "row_tokens" not in collate_packed(examples(), share=True)


def test_documents_that_share_a_beginning_have_the_losses_and_gradients_of_each_alone(model: LoRAModel) -> None:
    shared = replace(PACKED, shares_beginnings=True)
    batch = make_batch(conversations(), shared, CPU)
    assert batch.inputs["input_ids"].numel() == sum(len(document.input_ids) for document in conversations()) - 29
    results = []
    for layout in (PACKED, shared):
        model.zero_grad()
        with packed_rows(model.base_model):
            losses, owners = token_losses(model, conversations(), layout)
        (losses * torch.linspace(1, 2, len(losses))).sum().backward()
        results.append((losses.detach(), torch.from_numpy(owners), *(p.grad for p in model.lora_layers.parameters())))
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_padding_is_masked_and_not_trained() -> None:
    padded = collate_padded(PAIR, pad_id=9)
    assert padded["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]
