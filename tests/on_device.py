"""Which of the other tests run on the pretend accelerator too (`pytest -m device`): those of code that makes, moves or
computes with tensors. The rest, of settings, files and messages, is the same on every device."""

import re
from pathlib import Path

import torch

TESTS = Path(__file__).parent
FILES = {  # room -> names of its files, between "test_" and ".py"
    "core": "combine inference init layer merge mixed_batch model parameters running_statistics",
    "evaluation": "forgetting generate multiple_choice scores",
    "formats": "merged",
    "laws": "combine extras frozen_start laws",
    "papers": "dora",
    "train": "adapter_init classification divergence full loss loss_forms loss_scale "
    "packing preference rollouts seq2seq trainer",
}
CHOSEN = ("train",)  # these make everything on the CPU; what they call chooses the device

LEFT_OUT = {  # a pattern of tests -> why they do not run there
    r"core/test_inference\.py::test_a_second_generate_meanwhile": "looks at kernels of the CPU",
    r"core/test_inference\.py::test_the_last_states": "only a CPU copies the head",
    r"core/test_running_statistics\.py::test_nor_does_the_trainer": "transformers' trainer takes the rows to the CPU",
    r"evaluation/test_generate\.py::test_the_static_cache": "the static cache is the CPU's choice",
    r"formats/test_merged\.py::.*(quantised_base|int8|quantization)": "bitsandbytes, torchao",
    r"laws/test_laws\.py::test_(one_graph|the_shapes|a_copy)": "the device changes nothing about it",
    r"papers/test_dora\.py::test_the_norm_comes": "on a device the norms have the precision of the weight",
    r"train/test_trainer\.py::test_layers_below": (
        "a device's step is reported while the next one is queued, so that a listener stops it one step later"
    ),
    r"train/test_loss_scale\.py::test_gradients_of_64k": "makes an accelerator of the CPU",
    r"train/test_rollouts\.py::test_the_cache_is": "looks at continuous batching, which does not run there",
}


def runs(test: str) -> bool:
    """True if the test of this path below tests/ runs on the device."""
    room, _, rest = test.partition("/test_")
    is_listed = rest.partition(".py")[0] in FILES.get(room, "").split()
    return is_listed and not any(re.match(pattern, test) for pattern in LEFT_OUT)


def set_default_device(file: Path, device: torch.device) -> None:
    """Sets where torch makes the tensors of this file's tests."""
    room = file.relative_to(TESTS).parts[0] if file.is_relative_to(TESTS) else ""
    torch.set_default_device(device if room in FILES and room not in CHOSEN else None)
