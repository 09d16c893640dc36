"""The providers of attention on a GPU: right on a model, also with windows over 512 tokens, and the host never waits.

On the pretend accelerator only torch's SDPA can be tried; tests/kernels/test_device_attention.py tries the others on
the CPU.
"""

from collections.abc import Iterator

import pytest
import torch
from tiny import packed_row
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel

from tailora.kernels.attention import packed_rows
from tailora.kernels.device_attention import PROVIDERS
from tailora.train.kernel_choice import choose_packing
from tailora.train.kernel_comparison import obstacle_to_provider

SIZES = {"vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=20),
    "long window": MistralConfig(**GROUPED, sliding_window=600, max_position_embeddings=4096),
    "gemma 2": Gemma2Config(**GROUPED, head_dim=64, sliding_window=20),
}


def made(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval().to(device, dtype)


def skip_if_missing(provider: str, device: torch.device, dtype: torch.dtype) -> None:
    if missing := PROVIDERS[provider].obstacle(device, dtype):
        pytest.skip(f"{provider}: {missing}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_documents_have_the_logits_and_gradients_that_they_have_alone(
    device: torch.device, provider: str, dtype: torch.dtype, name: str
) -> None:
    skip_if_missing(provider, device, dtype)
    obstacle = obstacle_to_provider(made(name, dtype, device), provider, compare=True)
    if name == "gemma 2":
        assert "softcap" in str(obstacle)
    else:
        assert obstacle is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_provider_is_chosen(device: torch.device, dtype: torch.dtype) -> None:
    attention, _ = choose_packing(made("llama", dtype, device), "auto")
    assert attention == ("varlen_attn" if device.type == "cuda" and dtype == torch.bfloat16 else "sdpa")


@pytest.fixture
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    yield
    torch.get_device_module(device).set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("name", ["llama", "mistral", "long window"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_host_does_not_wait_in_a_step(device: torch.device, provider: str, name: str) -> None:
    skip_if_missing(provider, device, torch.bfloat16)
    model, row = made(name, torch.bfloat16, device), packed_row([700, 9, 14, 1300], device)
    with packed_rows(model, provider):
        model(**row).logits.sum().backward()  # compiles
        torch.get_device_module(device).set_sync_debug_mode("error")
        model(**row).logits.sum().backward()
