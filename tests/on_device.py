"""Which of the other tests run on the pretend accelerator too (`pytest -m device`), and which of them cannot."""

import re
from pathlib import Path

import torch

TESTS = Path(__file__).parent
MADE_THERE = ("core", "evaluation", "formats", "laws")  # what these tests make lies on the device
CHOSEN = ("train",)  # these make everything on the CPU; what they call chooses the device

LEFT_OUT = {  # a pattern of tests -> why they cannot run there
    r"core/test_mixed_batch\.py::.*-gru\]": "torch has one kernel for GRU cells on accelerators, and it is CUDA's",
    r"core/test_inference\.py::test_a_second_generate_meanwhile": "looks at kernels of the CPU",
    r"evaluation/test_generate\.py::test_the_static_cache": "the static cache is the CPU's choice",
    r"train/(test_full\.py::test_the_header_says|test_trainer\.py::test_a_layer_that_is_not_called)": (
        "the header names the CPU's kernels"
    ),
    r"train/(test_gradient_checkpointing\.py::test_layers_below|test_resume\.py)": (
        "a device's step is reported while the next one is queued, so that a listener stops it one step later;"
        " tests/device/test_steps.py stops and continues runs"
    ),
    r"train/test_kernel_choice\.py::test_(where_no_gain|layers_that_cannot)": (
        "the compiler makes no code for it, and the Llama kernels are the CPU's"
    ),
    r"train/test_loss_scale\.py::test_gradients_of_64k": "makes an accelerator of the CPU",
    r"(train/test_quantize|formats/test_merged)\.py::.*(quantised_base|int8|quantization)": "bitsandbytes, torchao",
    r"laws/(test_quantization|.*(nf4|fp4|int8|int4))": "bitsandbytes and torchao have no kernels for it",
    r"laws/(test_table|test_peft_experts\.py::test_ranks_scales|test_peft_special_layers\.py::test_a_linear_layer)": (
        "compares with a tensor of the CPU"
    ),
    r"laws/test_compiled\.py": "the compiler makes no code for it",
    r"core/test_combine\.py::test_singular_values_of_a_product": "compares with a tensor of the CPU",
    r"core/test_layer\.py::test_the_file_of_a_frozen_start": "compares with a tensor of the CPU",
    r"core/test_running_statistics\.py::test_nor_does_the_trainer": "transformers' trainer takes the rows to the CPU",
    r"train/test_huggingface\.py::test_(packed|the_loss|a_class)": "transformers' trainer takes the rows to the CPU",
    r"evaluation/test_spectral\.py::test_(directions_are|stronger|the_short_way|a_weight_without)": (
        "adds random updates, which are made on the CPU, to weights"
    ),
    r"formats/test_(export|gguf|io)\.py::test_(portable_needs|a_gguf_file_read|tensors_and_metadata)": (
        "compares with a file's tensors, which are the CPU's"
    ),
    r"formats/test_offline\.py::test_(scales|parts)": "compares with a file's tensors",
    r"train/test_huggingface\.py::test_(what_is_saved|the_best)": "calls the trained model with ids of the CPU",
}


def runs(test: str) -> bool:
    """True if the test of this path below tests/ runs on the device."""
    in_room = test.startswith(tuple(f"{room}/" for room in MADE_THERE + CHOSEN))
    return in_room and not any(re.match(pattern, test) for pattern in LEFT_OUT)


def set_default_device(file: Path, device: torch.device) -> None:
    """Sets where torch makes the tensors of this file's tests."""
    room = file.relative_to(TESTS).parts[0] if file.is_relative_to(TESTS) else ""
    torch.set_default_device(device if room in MADE_THERE else None)
