from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import run_and_collect
from tiny import GROUPED, SIZES
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedModel,
)

from tailora.errors import ConfigError
from tailora.kernels.device_attention import PROVIDERS, DeviceRow, Documents, Options, PaddedRow
from tailora.train import events
from tailora.train.kernel_choice import choose_packing, predicted_provider
from tailora.train.kernel_comparison import obstacle_to_sharing, random_documents

PACKS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "values of another width": DeepseekV3Config(
        **{**GROUPED, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
    ),
    "few positions": OPTConfig(
        **{**SIZES, "max_position_embeddings": 16, "ffn_dim": 48, "word_embed_proj_dim": 32, "attention_dropout": 0.1}
    ),
}
DOES_NOT = {
    "softcap": Gemma2Config(**GROUPED, head_dim=8),
    "own attention": GPTNeoConfig(**SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "recurrence": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
    "no registry": MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4),
    "chunks": Llama4TextConfig(**GROUPED, intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
}


def made(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


@pytest.mark.parametrize(
    ("provider", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("sdpa", torch.float32)]
)
@pytest.mark.parametrize("name", PACKS)
def test_models_that_isolate_documents_are_packed(
    name: str, provider: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.train.kernel_choice.candidates", lambda _: [provider])
    assert choose_packing(made(PACKS[name], dtype), "auto") == (provider, None)


@pytest.mark.parametrize("name", PACKS)
def test_models_that_isolate_documents_share_their_beginnings(name: str) -> None:
    assert obstacle_to_sharing(made(PACKS[name]), "cpu") is None


def test_a_model_that_depends_on_the_place_in_the_row_shares_no_beginnings() -> None:
    model = made(PACKS["llama"])
    convolution = torch.nn.Conv1d(32, 32, 3, padding=1, groups=32)  # mixes neighbours, as in hybrid models
    model.model.layers[0].register_forward_hook(lambda *call: convolution(call[2].mT).mT)
    assert "different logits" in str(obstacle_to_sharing(model, "cpu"))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_the_gradients_of_a_deep_model_is_no_reason_for_padding(seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{**GROUPED, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "initializer_range": 0.2}
    )
    assert choose_packing(LlamaForCausalLM(config).to(torch.bfloat16), "auto") == ("cpu", None)


@pytest.mark.parametrize("name", DOES_NOT)
def test_models_that_do_not_get_padded_batches_and_a_reason(name: str) -> None:
    model = made(DOES_NOT[name])
    before = model.config._attn_implementation
    attention, note = choose_packing(model, "auto")
    assert attention is None
    assert type(model).__name__ in (note or "")
    assert model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="packing='on' is not possible:"):
        choose_packing(model, "on")
    assert choose_packing(model, "off") == (None, None)


# ---- The providers of other devices, tried on the CPU


class AcrossDocuments(PaddedRow):
    """Takes the row for one document."""

    def __init__(self, documents: Documents) -> None:
        whole = torch.tensor([0, documents.total], dtype=torch.int32)
        super().__init__(Documents(whole, documents.total, documents.total, documents.windows))


class NoGradient(PaddedRow):
    """Computes no gradient of the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        return super().attend(q, k, v.detach(), options)


class NoDropout(PaddedRow):
    has_dropout = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        if options.dropout:
            raise ValueError("it has no dropout")
        return super().attend(q, k, v, options)


class NotHere(PaddedRow):
    @staticmethod
    def obstacle(_device: torch.device, _dtype: torch.dtype) -> str | None:
        return "the package is not installed"


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that offers providers beside "sdpa" to the choice."""

    def offer(**rows: type[DeviceRow]) -> None:
        for name, row in rows.items():
            monkeypatch.setitem(PROVIDERS, name, row)
        monkeypatch.setattr("tailora.train.kernel_choice.candidates", lambda _: [*rows, "sdpa"])

    return offer


@pytest.mark.parametrize(
    ("row", "reason"),
    [(AcrossDocuments, "different logits"), (NoGradient, "different gradients"), (NotHere, "not installed")],
)
def test_a_provider_that_is_wrong_or_missing_is_passed_over(
    row: type[DeviceRow], reason: str, offered: Callable[..., None]
) -> None:
    offered(wrong=row)
    attention, note = choose_packing(made(PACKS["llama"]), "auto")
    assert attention == "sdpa"
    assert "attention is computed by sdpa; wrong is not used, because" in str(note)
    assert reason in str(note)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_provider_without_dropout_is_taken_for_models_without(dropout: float, offered: Callable[..., None]) -> None:
    offered(without=NoDropout)
    model = made(LlamaConfig(**GROUPED, attention_dropout=dropout)).train()
    attention, note = choose_packing(model, "auto")
    assert attention == ("sdpa" if dropout else "without")
    assert ("has no dropout" in (note or "")) == bool(dropout)
    assert model.training


def test_a_run_records_what_computes_its_attention(offered: Callable[..., None], settings: Any) -> None:
    offered(missing=NotHere)
    _, seen = run_and_collect(settings(max_steps=2), events.Note | events.Prepared)
    assert any("missing is not used, because the package is not installed" in str(event) for event in seen)
    assert any("torch's SDPA, documents padded to the longest one" in str(event) for event in seen)


def test_a_model_of_text_and_images_is_tried_on_documents_longer_than_its_window() -> None:
    config = Gemma3Config(text_config={"sliding_window": 40, "vocab_size": 50})
    assert all(len(document.input_ids) > 40 for document in random_documents(config))


@pytest.mark.parametrize(
    ("device_type", "dtype", "provider"),
    [
        ("cuda", torch.bfloat16, "varlen_attn"),
        ("cuda", torch.float32, "sdpa"),
        ("mps", torch.float16, "sdpa"),
        ("meta", torch.float16, "sdpa"),
        ("cpu", torch.bfloat16, "cpu"),
    ],
)
def test_a_model_without_contents_is_reckoned_with_the_attention_of_its_device(
    device_type: str, dtype: torch.dtype, provider: str
) -> None:
    assert predicted_provider(device_type, dtype) == provider
    if device_type in ("meta", "cpu"):
        with torch.device(device_type):
            model = AutoModelForCausalLM.from_config(PACKS["llama"]).to(dtype)
        assert choose_packing(model, "auto", compare=False) == (provider, None)
