"""What an adapter must do on an architecture of transformers: one function for each column of docs/compatibility.md.

class_names      the classes to try
CHECKS           column -> function; it returns "yes", or in a few words what happened instead
small_model      a model of the class with few and small layers, the same every time
"""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Semaphore
from typing import Any

import peft
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import stir, tiny_model
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers.models.auto import modeling_auto as auto

from tailora import LoRAModel
from tailora.core.quantization import stored_tensors
from tailora.core.targets import task_heads
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.errors import TailoraError
from tailora.train.kernel_choice import checkpointed_layers

ROWS = 3

TASKS = ("CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
OTHERS = (  # classes for other tasks
    *("BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM", "AlbertForMaskedLM"),
    *("DebertaV2ForMaskedLM", "DistilBertForTokenClassification", "GPT2ForTokenClassification"),
    *("T5ForQuestionAnswering", "BertForMultipleChoice", "ViTForImageClassification", "SwinForImageClassification"),
    *("ResNetForImageClassification", "ConvNextForImageClassification", "Wav2Vec2ForCTC"),
    *("Wav2Vec2ForSequenceClassification", "WhisperForConditionalGeneration"),
)


def class_names() -> list[str]:
    """Returns the names of all classes that transformers registers for TASKS, and OTHERS."""
    entries = [entry for task in TASKS for entry in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()]
    names = [entry if isinstance(entry, str) else entry[0] for entry in entries]
    return list(dict.fromkeys([*names, *OTHERS]))


def small_model(class_name: str) -> nn.Module:
    model = tiny_model(class_name)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts heads and others so near zero that nothing shows
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def batch_of(model: Any) -> dict[str, Any]:
    """Returns random inputs of ROWS rows, by the names in the signature of the model's forward."""
    torch.manual_seed(1)
    names, config = inspect.signature(model.forward).parameters, model.config
    sides = getattr(getattr(config, "vision_config", None) or config, "image_size", 32)
    side = sides if isinstance(sides, int) else sides[0]
    vocab_size = getattr(config.get_text_config(), "vocab_size", 80)
    ids = torch.randint(3, max(vocab_size, 4), (ROWS, 8))
    batch: dict[str, Any] = {}
    if "input_ids" in names:
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "pixel_values" in names and (
        "input_ids" not in names or names["pixel_values"].default is inspect.Parameter.empty
    ):
        batch["pixel_values"] = torch.randn(ROWS, getattr(config, "num_channels", 3), side, side)
    elif not batch and "input_features" in names:
        frames = 2 * getattr(config, "max_source_positions", 32)  # Whisper takes no others
        batch["input_features"] = torch.randn(ROWS, getattr(config, "num_mel_bins", 8), frames)
    elif not batch and "input_values" in names:
        batch["input_values"] = torch.randn(ROWS, 1600)
    batch |= more_inputs(config, ids)
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: value[:, None].repeat(1, 2, 1) for name, value in batch.items()}
    if config.is_encoder_decoder and type(model).__name__.endswith("ForSequenceClassification"):
        ids[:, -1] = config.eos_token_id  # whose output is classified
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    batch |= {"use_cache": False} if "use_cache" in names else {}
    return batch


def more_inputs(config: Any, ids: Tensor) -> dict[str, Any]:
    """Returns what models that do not run on tokens alone need besides, and marks the places of an image in `ids`."""
    image = torch.randn(ROWS, 3, 32, 32)
    if (blip := config.model_type) in ("blip-2", "instructblip", "instructblipvideo"):
        frames = 4 if blip == "instructblipvideo" else 1
        token = config.video_token_id if blip == "instructblipvideo" else config.image_token_id
        ids[ids == token] = token + 1
        ids[:, : config.num_query_tokens * frames] = token
        images = image[:, None].repeat(1, frames, 1, 1, 1) if frames > 1 else image
        return {"pixel_values": images} | ({} if blip == "blip-2" else {"qformer_input_ids": ids})
    match config.model_type:
        case "diffusion_gemma":
            return {"decoder_input_ids": ids}
        case "idefics":
            return {"pixel_values": image[:, None], "image_attention_mask": torch.ones(*ids.shape, 1)}
        case "kosmos-2":
            places = torch.arange(8) < config.latent_query_num
            return {"pixel_values": image, "image_embeds_position_mask": places.expand(ROWS, -1)}
        case "molmo2":
            return {"mm_token_type_ids": torch.zeros_like(ids)}
        case "pix2struct":
            return {"flattened_patches": torch.rand(ROWS, 6, 2 + config.vision_config.patch_embed_hidden_size)}
        case "pp_formulanet":
            return {"pixel_values": image}
        case "udop":
            return {"bbox": torch.zeros(*ids.shape, 4)}
        case "voxtral_realtime":
            return {"input_features": torch.randn(ROWS, 8, 64)}
    return {}


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
    model = stirred(class_name)
    batch = batch_of(model.base_model)
    expected = output_of(model, batch)
    model.merge()
    return compare(output_of(model, batch), expected)


def unmerge(class_name: str) -> str:
    merged_outputs(stirred(class_name))
    return "yes"


def merged_outputs(model: LoRAModel) -> tuple[Tensor, Tensor]:
    """Returns the outputs with the adapter merged, and unmerged. Raises AssertionError if that changes the base."""
    batch = batch_of(model.base_model)
    expected = output_of(model, batch)  # first, because BigBird replaces modules in its first forward
    classes = [type(module) for module in model.base_model.modules()]
    before = [tensor.clone() for tensor in stored_tensors(model.base_model)]
    model.merge()
    merged = output_of(model, batch)
    model.unmerge()
    assert [type(module) for module in model.base_model.modules()] == classes, "unmerge does not restore the classes"
    assert all(map(torch.equal, stored_tensors(model.base_model), before)), "unmerge does not restore the base"
    return merged.float(), expected.float()


def checkpointing(class_name: str) -> str:
    """Gradients with gradient checkpointing are those without it; where they are not, also compares the base's."""
    result = same_gradients(stirred(class_name))
    if result == "yes":
        return result
    base = small_model(class_name)
    of_base = difference_of_gradients(base, base, list(base.parameters()))
    return result if of_base == "yes" else f"also without an adapter: {of_base}"


def same_gradients(model: LoRAModel) -> str:
    return difference_of_gradients(model, model.base_model, list(model.lora_layers.parameters()))


def difference_of_gradients(model: nn.Module, base: Any, parameters: list[nn.Parameter]) -> str:
    batch = batch_of(base)
    model.train()

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        loss = output_of(model, batch).float().square().mean()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    plain = gradients()
    with checkpointed_layers(base):
        again = gradients()
    worst = max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in zip(again, plain, strict=True))
    return "yes" if worst < 1e-3 else f"gradients differ by {worst:.1g}"


def rows(class_name: str) -> str:
    return compare(*outputs_of_rows(stirred(class_name, "a")))


def add_second(model: LoRAModel) -> None:
    """Adds an adapter "b" like "a", with different values."""
    model.add_adapter("b", model.adapters["a"])
    model.set_adapter("b")
    stir(model, seed=5)
    model.eval()


def outputs_of_rows(model: LoRAModel) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a batch with another adapter for each row, and those of each adapter by itself.

    model: has one adapter, "a"; it gets a second one.
    """
    add_second(model)
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
            result = compare(output_of(whole_graph(model), batch), expected)
            base = small_model(class_name)
            if result != "yes" and compare(output_of(whole_graph(base), batch), output_of(base, batch)) != "yes":
                return f"{result}; the compiled base differs too"
            return result
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


def generated_logits(model: Any, ids: Tensor) -> Tensor:
    """Returns the logits of two generated tokens."""
    return torch.stack(generated(model, ids).logits, 1)


def generated(model: Any, ids: Tensor, **inputs: Tensor) -> Any:
    settings = {"max_new_tokens": 2, "eos_token_id": [], "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = 1
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **inputs, **settings)


@torch.no_grad()
def generate(class_name: str) -> str:
    """With two adapters in a batch, generation computes the logits of each adapter alone."""
    model = stirred(class_name, "a")
    add_second(model)
    if (tokens := batch_of(model.base_model).get("input_ids")) is None:
        return "the base does not take tokens"
    ids = tokens[:2]
    base = small_model(class_name)
    try:
        both = generated_logits(base, ids)
    except ERRORS as error:
        return f"the base does not generate: {reason(error)}"
    if compare(both, torch.cat([generated_logits(base, ids[row : row + 1]) for row in range(2)])) != "yes":
        return "the base itself depends on the other rows"
    with model.adapter_rows(["a", "b"]):
        found = generated_logits(model, ids)
    expected = []
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        expected.append(generated_logits(model, ids[row : row + 1]))
    return compare(found, torch.cat(expected))


def serve(class_name: str) -> str:
    """The engine of `tailora serve` answers two requests with different adapters as `generate` does one by one."""
    model = stirred(class_name, "a")
    if model.config.is_encoder_decoder:
        return "the base does not generate: it has an encoder"
    if (of_rows := outcome("generate", class_name)).startswith("the base"):
        return of_rows
    add_second(model)
    tokens = batch_of(model.base_model)["input_ids"]
    prompts = {"a": tokens[:1, :4], "b": tokens[1:2]}  # of different lengths
    expected = {}
    for name, ids in prompts.items():
        model.set_adapter(name)
        expected[name] = generated(model, ids).sequences[0, ids.shape[1] :].tolist()
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    errors, ended = list[str](), Semaphore(0)
    engine = make_engine(model._adapter_set, [], max_positions=32, max_requests=2)
    try:
        engine.start()
        for name, ids in prompts.items():

            def handle(event: Token | Finish, name: str = name) -> None:
                if isinstance(event, Token):
                    answers[name].append(event.id)
                    return
                errors.extend([event.message] if event.reason == "error" else [])
                ended.release()

            params = SamplingParams(2, temperature=0.0, ignore_eos=True)
            engine.submit(Request(name, tuple(ids[0].tolist()), name, params), handle)
        if not all(ended.acquire(timeout=60) for _ in prompts):
            return "no answer within 60 seconds"
    finally:
        engine.stop()
    if errors or answers == expected:
        return errors[0] if errors else "yes"
    model.set_adapter("a")
    padded = torch.cat([torch.zeros_like(tokens[:1, 4:]), prompts["a"]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= padded.shape[1] - 4).long()[None]
    if generated(model, padded, attention_mask=mask).sequences[0, -2:].tolist() != expected["a"]:
        return "the base itself depends on padding"
    return f"{answers} instead of {expected}"


def peft_reads(class_name: str) -> str:
    model = stirred(class_name)
    batch = batch_of(model.base_model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder)
        theirs = peft.PeftModel.from_pretrained(small_model(class_name), folder).eval()
    result = compare(output_of(theirs, batch), output_of(model, batch))
    if result != "yes" and peft_reads_its_own(class_name) != "yes":
        return f"{result}; PEFT does not read its own file either"
    return result


def peft_reads_its_own(class_name: str) -> str:
    theirs = peft_model(class_name)
    batch = batch_of(theirs.get_base_model())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(small_model(class_name), folder).eval()
    return compare(output_of(again, batch), output_of(theirs, batch))


def reads_peft(class_name: str) -> str:
    theirs = peft_model(class_name)
    batch = batch_of(theirs.get_base_model())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = LoRAModel.from_pretrained(small_model(class_name), Path(folder)).eval()
    return compare(output_of(ours, batch), output_of(theirs, batch))


def peft_model(class_name: str) -> peft.PeftModel:
    """Returns PEFT's model with random values in all that it trains."""
    base = small_model(class_name)
    settings = {"r": 4, "target_modules": "all-linear", "modules_to_save": task_heads(base) or None}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return theirs


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
    "unmerge": unmerge,
    "checkpointing": checkpointing,
    "rows": rows,
    "generate": generate,
    "serve": serve,
    "compile": compiled,
    "PEFT reads": peft_reads,
    "reads PEFT": reads_peft,
}

ERRORS = (  # what a model or a library raises where something does not fit
    *(TailoraError, RuntimeError, ValueError, TypeError, AttributeError, LookupError),
    *(ImportError, AssertionError, ArithmeticError, StrictDataclassError),
)


def outcome(column: str, class_name: str) -> str:
    """Returns what the check says, or the error that it raises."""
    try:
        return CHECKS[column](class_name)
    except ERRORS as error:
        return reason(error)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
