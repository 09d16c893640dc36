import pytest
import torch
from tiny import GROUPED
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from tailora.kernels.attention import PackingError, packed_attention, packed_rows
from tailora.kernels.cpu_attention import BLOCK

CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
}
LENGTHS = [7, 1, 12, 3]


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def packed(model: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    ends = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    with packed_rows(model):
        output = model(torch.cat(documents)[None], position_ids=positions[None], cu_seq_lens_q=ends, use_cache=False)
    return output.logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_and_gradients_are_those_of_separate_documents(name: str) -> None:
    model = tiny(name)
    documents = [torch.randint(300, (length,)) for length in LENGTHS]
    weights = torch.randn(sum(LENGTHS), 300)
    together = packed(model, documents)
    alone = torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    gradients = (torch.autograd.grad((logits * weights).sum(), [*model.parameters()]) for logits in (together, alone))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1, 512, 1100])
@pytest.mark.parametrize("key_heads", [2, 6])
def test_attention_in_bfloat16_is_as_exact_as_torch(length: int, key_heads: int) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(1, length, heads, 16).transpose(1, 2) for heads in (6, key_heads, key_heads)]
    output_gradient = torch.randn(1, length, 6, 16)

    def run(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in exact]
        if ours:
            output = packed_attention(torch.nn.Module(), *leaves, None, cu_seq_lens_q=torch.tensor([0, length]))[0]
        else:
            output = torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        return [output, *torch.autograd.grad(output, leaves, output_gradient.to(dtype))]

    truth = [run(torch.float32, ours=False), run(torch.bfloat16, ours=False), run(torch.bfloat16, ours=True)]
    for wanted, torchs, ours in zip(*truth, strict=True):
        assert (ours - wanted).norm() <= 1.5 * (torchs - wanted).norm() + 1e-2 * wanted.norm()


def test_the_models_own_attention_comes_back_after_an_error() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(IndexError), packed_rows(model):
        model(torch.tensor([[300]]), cu_seq_lens_q=torch.tensor([0, 1]))
    assert model.config._attn_implementation == before


def test_dropout_of_attention_stays_within_documents_and_the_sliding_window() -> None:
    """A value of one document reaches the tokens of its own window alone, about as many of them as dropout keeps."""
    torch.manual_seed(0)
    lengths, window = [30, 7, 1, 23], 5
    total = sum(lengths)
    q, k = torch.randn(2, 1, 2, total, 8) / 100  # equal weights
    v = torch.eye(total).expand(1, 2, total, total)
    output, _ = packed_attention(
        torch.nn.Module(),
        *(q, k, v, None),
        cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0),
        max_length_q=max(lengths),
        dropout=0.5,
        sliding_window=window,
    )
    document = torch.repeat_interleave(torch.tensor(lengths))
    back = torch.arange(total)[:, None] - torch.arange(total)
    allowed = (document[:, None] == document) & (back >= 0) & (back < window)
    read = output[0].transpose(0, 1) > 0  # (heads, total, total)
    assert not (read & ~allowed).any()
    assert 0.3 < read.sum() / (2 * allowed.sum()) < 0.7


@pytest.mark.parametrize("width", [3, 20])
def test_values_may_have_another_width_than_keys(width: int) -> None:
    torch.manual_seed(0)
    heads = [torch.randn(1, 2, 9, size, requires_grad=True) for size in (8, 8, width)]
    ours, _ = packed_attention(torch.nn.Module(), *heads, None, cu_seq_lens_q=torch.tensor([0, 9]))
    torchs = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    weights = torch.randn_like(torchs)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    pairs = zip(*(torch.autograd.grad(output, heads, weights) for output in (ours, torchs)), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "cause"), [({}, "cu_seq_lens_q"), ({"attention_mask": torch.ones(1, 4)}, "padding")]
)
def test_rows_without_document_bounds_or_with_padding_are_refused(inputs: dict[str, Tensor], cause: str) -> None:
    model = tiny("llama")
    with packed_rows(model), pytest.raises(PackingError, match=cause):
        model(torch.arange(4)[None], **inputs)
