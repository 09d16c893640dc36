"""Tests what works with what: architecture x feature, server x feature, quantization x feature, on small models.

    python -m benchmarks.serving.compatibility                    writes benchmarks/results/compatibility.json
    python -m benchmarks.serving.compatibility --only servers     repeats one of the three parts

Each cell runs the feature: "yes" if the result is correct, otherwise a few words on what happened. The architectures
are the language models that benchmarks/studies/architectures.py attached an adapter to. `update_docs.py` writes the
tables of docs/compatibility.md from the result.
"""

import argparse
import json
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_checks import (
    ERRORS,
    batch_of,
    compare,
    merged_outputs,
    output_of,
    outputs_of_rows,
    reason,
    same_gradients,
    small_model,
    trains,
)
from tiny import chat_model, chat_tokenizer, stir
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from benchmarks import measure
from tailora import LoRAConfig, LoRAModel
from tailora.core.quantization import is_quantized
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.formats.serving_targets import TARGETS, ServingSettings
from tailora.kernels.compiled_layers import obstacle_to_compiling
from tailora.train.kernel_choice import choose_packing
from tailora.train.model_loading import check_can_be_sharded, load_base
from tailora.train.quantize import METHODS

ALL = measure.RESULTS / "compatibility.json"
CPU = torch.device("cpu")


def outcome(check: Callable[..., str], *arguments: Any) -> str:
    """Returns what the check says, or the error that it raises."""
    try:
        return check(*arguments)
    except ERRORS as error:
        return reason(error)


def adapted(base: Any, seed: int = 0, name: str = "default", **settings: Any) -> LoRAModel:
    """A model whose adapter has random weights; with this alpha its update is about as large as the random base."""
    model = LoRAModel(base, LoRAConfig(**{"r": 4, "lora_alpha": 0.5, **settings}), name)
    stir(model, seed)
    return model.eval()


# ---- Architectures


def language_models() -> list[str]:
    """Returns the classes of causal language models that an adapter was attached to."""
    found = json.loads((ALL.parent / "architectures.json").read_text())["architectures"]
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return [name for name, cells in found.items() if name in causal and cells.get("attach") == "yes"]


def packing(class_name: str) -> str:
    provider, note = choose_packing(small_model(class_name), "auto")
    return "yes" if provider is not None else str(note)


def compiled_layers(class_name: str) -> str:
    return obstacle_to_compiling(adapted(small_model(class_name)).base_model, CPU) or "yes"


def checkpointing(class_name: str) -> str:
    """Gradients with gradient checkpointing are those without it."""
    return same_gradients(adapted(small_model(class_name)))


def dora(class_name: str) -> str:
    """The adapter changes the output, and merging keeps it."""
    base = small_model(class_name)
    merged, expected = merged_outputs(adapted(small_model(class_name), use_dora=True))
    if torch.equal(expected, output_of(base, batch_of(base)).float()):
        return "the adapter changes nothing"
    return compare(merged, expected)


def exported(class_name: str, target: str) -> str:
    model = adapted(small_model(class_name))
    model.base_model.config.max_position_embeddings = getattr(model.base_model.config, "max_position_embeddings", 64)
    return export(model, target)


def served(class_name: str) -> str:
    """The engine that `tailora serve` chooses answers as the model does alone."""
    try:
        small_model(class_name).generate(torch.tensor([[3, 9, 11, 5]]), max_new_tokens=2, pad_token_id=0)
    except ERRORS as error:
        return f"not tried: transformers does not generate with the small base: {reason(error)}"
    return answers(adapted(small_model(class_name)))


ARCHITECTURE_CHECKS: dict[str, Callable[[str], str]] = {
    "DoRA": dora,
    "gradient checkpointing": checkpointing,
    "packing": packing,
    "compiled layers": compiled_layers,
    "vLLM": lambda name: exported(name, "vllm"),
    "llama-server": lambda name: exported(name, "llama-server"),
    "mlx-lm": lambda name: exported(name, "mlx"),
    "tailora serve": served,
}


def architecture_cells() -> dict[str, dict[str, str]]:
    cells = {}
    for name in language_models():
        cells[name] = {column: outcome(check, name) for column, check in ARCHITECTURE_CHECKS.items()}
        measure.log(f"{name} {cells[name]}")
    return cells


# ---- What several checks compute


def export(model: LoRAModel, target: str) -> str:
    """Returns "adapter" or "merged"; an export compares what it wrote with the model, and raises where they differ."""
    tokenizer = chat_tokenizer(["hello"], bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as folder:
        settings = ServingSettings(base="owner/base", stop_tokens={2: "<|im_end|>"})
        result = model.export_for(Path(folder) / "out", target, settings=settings, tokenizer=tokenizer)
    if not result.serving.is_merged:
        return "adapter"
    return f"merged: {result.report.changes[0].removeprefix('the whole model is merged, because ')}"


@torch.no_grad()
def answers(model: LoRAModel, tokens: int = 6) -> str:
    prompt = [3, 9, 11, 5]
    model.lora_layers.requires_grad_(False)  # as the server has them
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": [], "pad_token_id": 0}
    alone = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    engine = make_engine(model._adapter_set, [], max_positions=32)
    received: list[int] = []
    ended, finish = threading.Event(), list[Finish]()

    def handle(event: Token | Finish) -> None:
        if isinstance(event, Token):
            received.append(event.id)
        else:
            finish.append(event)
            ended.set()

    engine.start()
    try:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Request("one", tuple(prompt), "default", params), handle)
        if not ended.wait(60):
            return "no answer in a minute"
    finally:
        engine.stop()
    kind = type(engine).__name__.removesuffix("Engine").lower()
    if finish[0].reason == "error":
        return f"{kind}: {finish[0].message}"
    return f"yes, {kind}" if received == alone else f"{kind}: another answer than alone"


# ---- Servers

FEATURES: dict[str, dict[str, Any]] = {  # what an adapter has -> its settings
    "default targets": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "one block only": {"layers_to_transform": [1]},
    "r = 2": {"r": 2},
    "r = 48": {"r": 48},
    "mixed ranks": {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    "rsLoRA": {"use_rslora": True},
    "learned scale": {"learn_scaling": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "DoRA": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output head": {"target_modules": ["q_proj", "lm_head"]},
    "new tokens": {"trainable_token_indices": [5, 7]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}


def server_base() -> Any:
    return chat_model(**SIZES, attention_bias=True, bos_token_id=0, eos_token_id=2, pad_token_id=0)


def server_cell(target: str, settings: dict[str, Any]) -> str:
    model = adapted(server_base(), **settings)
    return answers(model) if target == OWN_SERVER else export(model, target)


OWN_SERVER = "tailora serve"


def server_cells() -> dict[str, dict[str, str]]:
    cells = {}
    for target in (*TARGETS, OWN_SERVER):
        cells[target] = {name: outcome(server_cell, target, settings) for name, settings in FEATURES.items()}
        measure.log(f"{target} {cells[target]}")
    return cells


# ---- Quantisation


class Quantized:
    """Loads the small model again and again in one format."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.dtype = str(folder), "bfloat16" if method == "bfloat16" else "float32"  # of what is plain
        self.quantize = method if method in METHODS else None

    def base(self) -> Any:
        return load_base(self.folder, self.dtype, CPU, self.quantize)[0].eval()

    def load(self) -> str:
        base = self.base()
        return "yes" if self.quantize is None or any(map(is_quantized, base.modules())) else "nothing is quantised"

    def train(self) -> str:
        return trains(self.base())

    def merge(self, **settings: Any) -> str:
        return nearly(*merged_outputs(adapted(self.base(), **settings)))

    def plain_model(self) -> str:
        """merge_and_unload gives a model of plain layers that computes the same."""
        model = adapted(self.base())
        batch, expected = batch_of(model.base_model), output_of(model, batch_of(model.base_model))
        base: Any = model.merge_and_unload()
        if any(map(is_quantized, base.modules())):
            return "stays quantised"
        return nearly(output_of(base, batch).float(), expected.float())

    def pissa(self) -> str:
        """A new adapter computes the base."""
        plain = self.base()
        model = LoRAModel(self.base(), LoRAConfig(r=4, init_lora_weights="pissa")).eval()
        batch = batch_of(plain)
        return nearly(output_of(model, batch).float(), output_of(plain, batch).float())

    def rows(self) -> str:
        found, expected = outputs_of_rows(adapted(self.base(), name="a"))
        return nearly(found.float(), expected.float())

    def file(self) -> str:
        """A saved adapter computes the same on the base that is loaded again."""
        model = adapted(self.base())
        batch = batch_of(model.base_model)
        expected = output_of(model, batch)
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(Path(folder) / "adapter")
            again = LoRAModel.from_pretrained(self.base(), Path(folder) / "adapter").eval()
            return "yes" if torch.equal(output_of(again, batch), expected) else "another output"

    def checks(self) -> dict[str, Callable[[], str]]:
        return {
            "train": self.train,
            "DoRA": lambda: self.merge(use_dora=True),
            "PiSSA": self.pissa,
            "merge and unmerge": self.merge,
            "merge_and_unload": self.plain_model,
            "rows": self.rows,
            "save and load": self.file,
            "lm_head in full": lambda: self.merge(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "gradient checkpointing": lambda: same_gradients(adapted(self.base())),
            "compiled layers": lambda: obstacle_to_compiling(adapted(self.base()).base_model, CPU) or "yes",
            "FSDP": self.shard,
            "export": lambda: export(adapted(self.base()), "vllm"),
            "tailora serve": lambda: answers(adapted(self.base())),
        }

    def shard(self) -> str:
        check_can_be_sharded(transformers.AutoConfig.from_pretrained(self.folder), "base", self.quantize)
        return "yes"


def nearly(found: Tensor, expected: Tensor) -> str:
    """Returns "yes" for differences that the rounding of 16 bits explains, else the relative one."""
    difference = float((found - expected).norm() / expected.norm())
    return "yes" if difference < 0.02 else f"{difference:.0%} apart"


def quantization_cells() -> dict[str, dict[str, str]]:
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        chat_model(hidden_size=128, intermediate_size=192).save_pretrained(folder)
        chat_tokenizer(["hello"], eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(folder)
        for method in ("float32", "bfloat16", *METHODS):
            quantized = Quantized(Path(folder), method)
            loads = outcome(quantized.load)
            if loads == "yes":
                cells[method] = {name: outcome(check) for name, check in quantized.checks().items()}
            else:
                cells[method] = dict.fromkeys(quantized.checks(), loads)
            measure.log(f"{method} {cells[method]}")
    return cells


PARTS = {"architectures": architecture_cells, "servers": server_cells, "quantization": quantization_cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = json.loads(ALL.read_text()) if ALL.exists() else {}
    for name in options.only:
        results[name] = PARTS[name]()
        measure.write(ALL, {part: results[part] for part in PARTS if part in results})
    print(ALL)


if __name__ == "__main__":
    main()
