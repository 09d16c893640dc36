from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from tailora.errors import ConfigError
from tailora.train import events
from tailora.train.packing import choose_packing
from tailora.train.trainer import run

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
PACKS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
}
DOES_NOT = {
    "softcap": Gemma2Config(**GROUPED, head_dim=8),
    "own attention": GPTNeoConfig(**SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "recurrence": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
    "chunks": Llama4TextConfig(**GROUPED, intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
}


def made(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKS)
def test_models_that_isolate_documents_are_packed(name: str, dtype: torch.dtype) -> None:
    assert choose_packing(made(PACKS[name], dtype), "auto") == (True, None)


@pytest.mark.parametrize("name", DOES_NOT)
def test_models_that_do_not_get_padded_batches_and_a_reason(name: str) -> None:
    model = made(DOES_NOT[name])
    before = model.config._attn_implementation
    packed, note = choose_packing(model, "auto")
    assert not packed
    assert type(model).__name__ in (note or "")
    assert model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="packing = 'on', but"):
        choose_packing(model, "on")
    assert choose_packing(model, "off") == (False, None)


def test_a_model_that_is_not_packed_still_trains(settings: Any, tmp_path: Any, model_folder: Any) -> None:
    from transformers import AutoTokenizer

    made(Gemma2Config(**{**GROUPED, "vocab_size": 320}, head_dim=8)).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "gemma")
    notes: list[str] = []
    config = settings(model=str(tmp_path / "gemma"), max_steps=6)
    result = run(config, on_event=lambda event: notes.append(event.text) if isinstance(event, events.Note) else None)
    assert any("softcap" in note for note in notes)
    assert result.eval_loss_after < result.eval_loss_before
