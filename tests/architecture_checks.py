"""What an adapter must do on an architecture of transformers: one function for each column of docs/architectures.md.

ARCHITECTURES    model type -> the class that stands for it
CHECKS           column -> function; it returns "yes", or in a few words what happened instead
small_model      a model of the class with few and small layers, the same every time
"""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from tiny import stir, tiny_model
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers.models.auto import modeling_auto as auto

from tailora import LoRAModel
from tailora.core.quantization import stored_tensors
from tailora.core.targets import task_heads
from tailora.errors import TailoraError

ROWS = 3

# In this order, the first task that a model type has a class for gives its class.
TASKS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ"),
    *("SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT"),
)
FIRST = (  # what most people use, and classes for other tasks; they come first
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"),
    *("GPTNeoXForCausalLM", "GPTJForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "FalconForCausalLM"),
    *("MptForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM"),
    *("DeepseekV3ForCausalLM", "GptOssForCausalLM", "OlmoeForCausalLM", "MambaForCausalLM", "JambaForCausalLM"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForMaskedLM", "RobertaForMaskedLM"),
    *("DistilBertForMaskedLM", "ModernBertForMaskedLM", "DebertaV2ForMaskedLM", "AlbertForMaskedLM"),
    *("BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForTokenClassification"),
    *("LlamaForSequenceClassification", "T5ForQuestionAnswering", "BertForMultipleChoice"),
    *("ModernBertForSequenceClassification", "GPT2ForTokenClassification", "ViTForImageClassification"),
    *("ResNetForImageClassification", "ConvNextForImageClassification", "SwinForImageClassification"),
    *("Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification", "WhisperForConditionalGeneration"),
    *("MT5ForConditionalGeneration", "MBartForConditionalGeneration", "PegasusForConditionalGeneration"),
    *("StableLmForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM"),
    *("GraniteForCausalLM", "GlmForCausalLM", "SmolLM3ForCausalLM", "GPTBigCodeForCausalLM", "GPTNeoForCausalLM"),
)


def class_names() -> list[str]:
    """Returns the names of all classes to try: FIRST, and one for each other model type that has one of the tasks."""
    names: dict[str, str] = {}  # model type -> class
    for task in TASKS:
        for model_type, of_type in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            names.setdefault(model_type, of_type if isinstance(of_type, str) else of_type[0])
    return list(dict.fromkeys([*FIRST, *names.values()]))


# Settings of small models that the table of sizes in tiny.py does not give
SETTINGS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_d_head": 16},
    "ConvNextForImageClassification": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "DeepseekV2ForCausalLM": {"num_key_value_heads": 4},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Glm4MoeLiteForCausalLM": {"num_key_value_heads": 4},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "JambaForCausalLM": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    "LongcatFlashForCausalLM": {"num_key_value_heads": 4},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "MiniCPM3ForCausalLM": {"num_key_value_heads": 4},
    "MinistralForCausalLM": {"head_dim": 8},
    "SwinForImageClassification": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "YoutuForCausalLM": {"num_key_value_heads": 4},
}


def small_model(class_name: str) -> nn.Module:
    model = tiny_model(class_name, **SETTINGS.get(class_name, {}))
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts heads and others so near zero that nothing shows
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def batch_of(model: Any) -> dict[str, Any]:
    """Returns random inputs of ROWS rows, by the names in the signature of the model's forward."""
    torch.manual_seed(1)
    names, config = inspect.signature(model.forward).parameters, model.config
    sides = (
        getattr(config, "image_size", 32) if not hasattr(config, "vision_config") else config.vision_config.image_size
    )
    side = sides if isinstance(sides, int) else sides[0]
    vocab_size = getattr(config.get_text_config(), "vocab_size", 80)
    ids = torch.randint(3, max(vocab_size, 4), (ROWS, 8))
    batch: dict[str, Any] = {}
    if "input_ids" in names:
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif "pixel_values" in names:
        batch["pixel_values"] = torch.randn(ROWS, getattr(config, "num_channels", 3), side, side)
    elif "input_features" in names:
        frames = 2 * getattr(config, "max_source_positions", 32)  # Whisper takes no others
        batch["input_features"] = torch.randn(ROWS, getattr(config, "num_mel_bins", 8), frames)
    elif "input_values" in names:
        batch["input_values"] = torch.randn(ROWS, 1600)
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: value[:, None].repeat(1, 2, 1) for name, value in batch.items()}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    batch |= {"use_cache": False} if "use_cache" in names else {}
    return batch


def output_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(**batch)
    return (
        output["logits"] if "logits" in output else next(value for value in output.values() if torch.is_tensor(value))
    )


def stirred(class_name: str, name: str = "default", seed: int = 0) -> LoRAModel:
    model = LoRAModel(small_model(class_name), adapter_name=name)
    stir(model, seed)
    return model.eval()


# ---- The columns


def attach(class_name: str) -> str:
    base = small_model(class_name)
    batch = batch_of(base)
    plain = output_of(base, batch)
    model = LoRAModel(base).eval()
    difference = compare(output_of(model, batch), plain)
    model.unload()
    return difference if torch.equal(output_of(base, batch), plain) else "unload does not restore the output"


def train(class_name: str) -> str:
    return trains(small_model(class_name))


def trains(base: nn.Module) -> str:
    """Eight steps of a new adapter towards a random output."""
    batch = batch_of(base)
    before = [tensor.clone() for tensor in stored_tensors(base)]
    model = LoRAModel(base)
    with torch.no_grad():
        output = output_of(model.eval(), batch).float()
        target = output + torch.randn_like(output)
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=2e-3)
    first = (output - target).square().mean()
    for _ in range(8):
        model.train()
        (output_of(model, batch).float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = (output_of(model.eval(), batch).float() - target).square().mean()
    model.unload()
    if not all(map(torch.equal, stored_tensors(base), before)):
        return "changes the base"
    return "yes" if loss < first else f"loss {first:.2g} -> {loss:.2g}"


def merge(class_name: str) -> str:
    return compare(*merged_outputs(stirred(class_name)))


def merged_outputs(model: LoRAModel) -> tuple[Tensor, Tensor]:
    """Returns the outputs with the adapter merged, and unmerged. Raises AssertionError if that changes the base."""
    batch = batch_of(model.base_model)
    before = [tensor.clone() for tensor in stored_tensors(model.base_model)]
    expected = output_of(model, batch)
    model.merge()
    merged = output_of(model, batch)
    model.unmerge()
    assert all(map(torch.equal, stored_tensors(model.base_model), before)), "unmerge does not restore the base"
    return merged.float(), expected.float()


def rows(class_name: str) -> str:
    return compare(*outputs_of_rows(stirred(class_name, "a")))


def outputs_of_rows(model: LoRAModel) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a batch with another adapter for each row, and those of each adapter by itself.

    model: has one adapter, "a"; it gets a second one.
    """
    model.add_adapter("b", model.adapters["a"])
    model.set_adapter("b")
    stir(model, seed=5)
    model.eval()
    batch, names = batch_of(model.base_model), ["a", None, "b"]
    expected = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        expected.append(output_of(model, batch)[row])
    with model.adapter_rows(names):
        found = output_of(model, batch)
    return found, torch.stack(expected)


def compiled(class_name: str) -> str:
    """One graph where the base gives one; equal outputs in any case."""
    model = stirred(class_name)
    batch = batch_of(model.base_model)
    with torch.no_grad():
        expected = output_of(model, batch)
        try:
            return compare(output_of(whole_graph(model), batch), expected)
        except TorchDynamoException as error:
            try:
                whole_graph(small_model(class_name))(**batch)
            except TorchDynamoException:
                torch._dynamo.reset()
                result = compare(output_of(torch.compile(model, backend="eager"), batch), expected)
                return "yes, in parts like the base" if result == "yes" else result
            raise error


def whole_graph(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def peft_reads(class_name: str) -> str:
    model = stirred(class_name)
    batch = batch_of(model.base_model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder)
        theirs = peft.PeftModel.from_pretrained(small_model(class_name), folder).eval()
    return compare(output_of(theirs, batch), output_of(model, batch))


def reads_peft(class_name: str) -> str:
    base = small_model(class_name)
    batch, heads = batch_of(base), task_heads(base)
    settings = {"r": 4, "target_modules": "all-linear", "modules_to_save": heads or None}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = LoRAModel.from_pretrained(small_model(class_name), Path(folder)).eval()
    return compare(output_of(ours, batch), output_of(theirs, batch))


def compare(found: Tensor, expected: Tensor) -> str:
    """Returns "yes", or how far the outputs are apart."""
    largest = max(1.0, float(expected.abs().max()))
    if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * largest):
        return "yes"
    return f"{float((found - expected).abs().max()):.2g} apart"


CHECKS: dict[str, Callable[[str], str]] = {
    "attach": attach,
    "train": train,
    "merge": merge,
    "rows": rows,
    "compile": compiled,
    "PEFT reads": peft_reads,
    "reads PEFT": reads_peft,
}

ERRORS = (  # what a model or a library raises where something does not fit
    *(TailoraError, RuntimeError, ValueError, TypeError, AttributeError, LookupError),
    *(ImportError, AssertionError, ArithmeticError),
)


def outcome(column: str, class_name: str) -> str:
    """Returns what the check says, or the error that it raises."""
    try:
        return CHECKS[column](class_name)
    except ERRORS as error:
        return reason(error)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
