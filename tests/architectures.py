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
from cases import stir
from tiny import tiny_model
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from tailora import LoRAModel
from tailora.core.targets import task_heads

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
ROWS = 3

# In this order, the first task that a model type has a class for gives its class.
TASKS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CTC"),
    *("IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
)
# Classes beside these, for other tasks
CLASSIFIERS = (
    *("BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForTokenClassification"),
    *("LlamaForSequenceClassification", "T5ForQuestionAnswering", "Wav2Vec2ForSequenceClassification"),
    *("BertForMultipleChoice", "GPT2ForTokenClassification", "ModernBertForSequenceClassification"),
)


def class_names() -> dict[str, str]:
    """Returns class of a model -> its model type, of all tasks above."""
    found: dict[str, str] = {}
    for task in TASKS:
        for model_type, names in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            if model_type not in found.values():
                found[names if isinstance(names, str) else names[0]] = model_type
    return found


# Settings of small models that the table of sizes in tiny.py does not give
SETTINGS: dict[str, dict[str, Any]] = {}


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
        batch["input_features"] = torch.randn(ROWS, getattr(config, "num_mel_bins", 8), 64)
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
    """Twenty steps towards a random output."""
    base = small_model(class_name)
    batch = batch_of(base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = LoRAModel(base)
    with torch.no_grad():
        output = output_of(model.eval(), batch)
        target = output + torch.randn_like(output)
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-3)
    first = loss = (output - target).square().mean()
    for _ in range(20):
        model.train()
        (output_of(model, batch) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = (output_of(model.eval(), batch) - target).square().mean()
    model.unload()
    if changed := [name for name, value in base.state_dict().items() if not torch.equal(value, before[name])]:
        return f"changes {changed[0]} of the base"
    return "yes" if loss < first else f"loss {first:.2g} -> {loss:.2g}"


def merge(class_name: str) -> str:
    model = stirred(class_name)
    batch = batch_of(model.base_model)
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    expected = output_of(model, batch)
    model.merge()
    difference = compare(output_of(model, batch), expected)
    model.unmerge()
    after = model.base_model.state_dict()
    return difference if all(torch.equal(after[name], value) for name, value in before.items()) else "unmerge fails"


def rows(class_name: str) -> str:
    model = stirred(class_name, "a")
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
    return compare(found, torch.stack(expected))


def compiled(class_name: str) -> str:
    """One graph where the base gives one; equal outputs in any case."""
    torch._dynamo.reset()
    base = small_model(class_name)
    batch = batch_of(base)
    try:
        torch.compile(base, fullgraph=True, backend="eager")(**batch)
        is_whole = True
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises: the base itself is not one graph
        is_whole, _ = False, error
    torch._dynamo.reset()
    model = stirred(class_name)
    expected = output_of(model, batch)
    result = compare(output_of(torch.compile(model, fullgraph=is_whole, backend="eager"), batch), expected)
    return result if is_whole or result != "yes" else "yes, in parts like the base"


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
    if torch.allclose(found, expected, **TOLERANCE):
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
