"""A GGUF file -> a Hugging Face folder in bfloat16, read by transformers."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailora.quiet import quiet


def convert(source: Path, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation settings of `source` into `folder`."""
    with quiet(warnings=False), redirect_stderr(io.StringIO()):  # the bar of unpacking knows no switch
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The weights are dense now; what says that they are quantised would forbid saving.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
