"""Markdown of what scaling.py calculated for large models on many GPUs."""

from typing import Any

from tables import table

Content = dict[str, Any]  # of the JSON file
GROUPS = {  # column -> parts of memory
    "weights": ("weights",),
    "whole layers": ("gathered",),
    "trained, gradients, AdamW": ("adapters", "gradients", "optimizer"),
    "activations": ("activations", "logits"),
    "process": ("process",),
}


def models(content: Content) -> str:
    """The shapes, and what an adapter of r = 16 on all linear layers adds."""
    rows = []
    for name, shape in content["models"].items():
        experts = f"{shape['num_experts']}, {shape['num_experts_per_tok']} at a time" if "num_experts" in shape else "-"
        numbers = [shape[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
        sizes = f"{shape['parameters'] / 1e9:.1f}B", f"{shape['trained'] / 1e6:.0f}M"
        rows.append([name, *sizes, *(f"{number:,}" for number in numbers), experts, f"{shape['vocab_size']:,}"])
    return table(["model", "parameters", "r = 16", "layers", "width", "heads", "experts", "vocabulary"], rows)


def memory(content: Content) -> str:
    """GB of a rank."""
    rows = []
    for cell in content["cells"]:
        result, parts = cell["result"], cell["result"]["memory"]
        sums = [sum(parts[name] for name in names) for names in GROUPS.values()]
        fits = "" if result["fits"] else "too much"
        rows.append([*name_of(cell), *map(gigabytes, [*sums, parts["total"], result["loading"]]), fits])
    return table(["model", "method", "GPUs", "base", *GROUPS, "together", "while loading", ""], rows)


def time(content: Content) -> str:
    """Bytes and seconds of a step, and hours, for what fits."""
    rows = []
    for cell in content["cells"]:
        result = cell["result"]
        if result["fits"]:
            hours, tokens = result["gpu_hours_per_billion_tokens"], result["balancing_tokens"]
            links = (
                [gigabytes(result["sent_bytes"]), f"{result['link_seconds']:.2f}"]
                if result["sent_bytes"]
                else ["-"] * 2
            )
            rows.append(
                [
                    *name_of(cell),
                    *links,
                    f"{result['computing_seconds']:.2f}",
                    f"{result['step_seconds']:.2f}",
                    f"{result['tokens_per_second']:,.0f}",
                    f"{hours:,.0f}",
                    f"{tokens:,.0f}" if result["sharded"] else "-",
                ]
            )
    head = [
        "GB sent",
        "s on links",
        "s computing",
        "s a step",
        "tokens/s",
        "GPU-hours for 10^9 tokens",
        "tokens to balance",
    ]
    return table(["model", "method", "GPUs", "base", *head], rows)


def name_of(cell: dict[str, Any]) -> list[str]:
    where = cell["cell"]
    return [where["model"], where["method"], str(where["gpus"]), "sharded" if cell["result"]["sharded"] else "whole"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size else "-"


def experts_in_nf4(content: Content) -> str:
    """What QLoRA of the mixture of experts would take if its experts were quantised as linear layers are."""
    weights = {
        (cell["cell"]["model"], cell["cell"]["method"]): cell["result"]["memory"]["weights"]
        for cell in content["cells"]
        if cell["cell"]["gpus"] == 1
    }
    dense, moe = "Llama-3.1-8B", "Qwen3-235B-A22B"
    outside = [
        2 * 2 * shape["vocab_size"] * shape["hidden_size"]
        for shape in (content["models"][name] for name in (dense, moe))
    ]
    share = (weights[dense, "QLoRA"] - outside[0]) / (weights[dense, "LoRA"] - outside[0])
    quantized = outside[1] + share * (weights[moe, "LoRA"] - outside[1])
    return (
        f"In {moe} NF4 makes {gigabytes(weights[moe, 'QLoRA'])} GB of {gigabytes(weights[moe, 'LoRA'])}: bitsandbytes "
        "quantises linear layers, and transformers keeps all experts of a layer in one tensor of three dimensions, "
        f"which stays in 16 bits. With the experts in NF4, too, the weights would take {gigabytes(quantized)} GB."
    )
