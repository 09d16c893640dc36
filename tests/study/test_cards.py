"""Cards that are not here: their names and figures, and the roofline time of a step."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LLAMA_3_8B
from transformers import LlamaConfig

from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.study.cards import BANDWIDTH_REACHED, CARDS, LAUNCH, Card, find_cards, step_time
from tailora.train.config import TrainConfig
from tailora.train.estimate import AbsentDevice, fake_model, simulate_step
from tailora.train.memory_tracker import Operator

CARD = Card("of the test", memory=10, bandwidth=1000, peak_16=100, peak_32=10)


def test_the_figures_of_every_card_are_in_their_units() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert re.search(rf" {card.memory:g}GB$", card.name)
        assert 4 < card.memory <= 512
        assert 60 < card.bandwidth <= 8000  # GB/s, no TB/s
        assert 2 < card.peak_32 <= card.peak_16 <= 2250  # dense: the largest is B200's
        assert card.peak_16 / card.peak_32 <= 30
        assert 2 <= 1000 * card.peak_16 / card.bandwidth <= 500  # operations for a byte
        assert card.device in {"cuda", "xpu", "mps"}
    without = {card.name.partition(" ")[0] for card in CARDS if not card.has_bfloat16}
    assert without == {"T4", "V100", "RTX"}  # before Ampere


def test_the_table_in_the_documents_is_that_of_the_code() -> None:
    document = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in document.splitlines() if line.startswith("| ")]
    listed = {f"{row[0]} {size}GB": row[2:] for row in rows if len(row) == 6 for size in row[1].split(", ")}
    for card in CARDS:
        figures = [f"{number:,g}" for number in (card.bandwidth, card.peak_16, card.peak_32)]
        assert listed[card.name] == [*figures, "yes" if card.has_bfloat16 else "no"]


@pytest.mark.parametrize(
    "names",
    [
        ("RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090", "RTX 3090 Ti"),
        ("RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Super", "RTX 4070 Ti", "RTX 4080", "RTX 4090", "RTX 5090"),
        ("RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090"),
        ("T4", "V100 PCIe", "V100 SXM2", "A100 SXM4", "H100 PCIe", "H100 NVL", "H100 SXM", "B200"),
        ("L4", "L40", "L40S"),
        ("M1 8GB", "M1 Pro", "M1 Max", "M1 Ultra"),
        ("M4 16GB", "M4 Pro", "M4 Max", "M3 Ultra"),
    ],
)
def test_a_better_card_is_faster(names: tuple[str, ...]) -> None:
    peaks = [find_cards(name)[0].peak_16 for name in names]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("h100", "H100 SXM 80GB"),
        ("H100 80GB", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),  # torch's names of cards
        ("NVIDIA A100-SXM4-40GB", "A100 SXM4 40GB"),
        ("Tesla V100-SXM2-32GB", "V100 SXM2 32GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("Apple M2 Max", "M2 Max 32GB"),
        ("a100 80 gb", "A100 SXM4 80GB"),
        ("rtx4070ti", "RTX 4070 Ti 12GB"),
        ("4070", "RTX 4070 12GB"),
        ("l40", "L40 48GB"),
        ("a10g", "A10G 24GB"),
        ("A10", "A10 24GB"),
        ("m1", "M1 8GB"),
        ("m3 max 128gb", "M3 Max 128GB"),
        ("AMD Instinct MI300X", "MI300X 192GB"),
        ("Arc A770", "Arc A770 16GB"),
    ],
)
def test_names_may_leave_parts_out(name: str, first: str) -> None:
    assert find_cards(name)[0].name == first


def test_every_card_is_found_by_its_own_name() -> None:
    assert all(find_cards(card.name)[0] is card for card in CARDS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h1000", "h100"),
        ("rtx 4091", "rtx 4090"),
        ("m9 max", "m2 max"),
        ("A100 81GB", "a100"),
        ("toaster", "RTX 4090"),
        ("", "RTX 4090"),
        ("NVIDIA", "RTX 4090"),
        ("cuda:1", '"Will it fit?" in the docs'),
        ("../../etc/passwd\x00\x1b[2J", '"Will it fit?" in the docs'),
        ("9" * 100_000, '"Will it fit?" in the docs'),
    ],
)
def test_unknown_names_are_refused_with_similar_ones(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_cards(name)
    assert said in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_step_takes_the_longer_of_products_traffic_and_launches() -> None:
    product = Operator(flops=6e12, bytes=10**6, dtype=torch.bfloat16)  # .1 s at 60 TFLOP/s, far above its traffic
    wide = Operator(flops=6e12, bytes=10**6, dtype=torch.float32)
    copy = Operator(flops=0, bytes=9 * 10**10, dtype=torch.bfloat16)  # .1 s at 900 GB/s
    time = step_time(CARD, {product: 2, wide: 1, copy: 3})
    assert time.products == pytest.approx(2 * 0.1 + 1.0)
    assert time.memory == pytest.approx(0.3)
    assert time.launches == pytest.approx(6 * LAUNCH)


@pytest.mark.slow
def test_the_products_of_llama_8b_are_those_of_a_calculation_by_hand() -> None:
    """2,048 tokens on an H100 at 600 TFLOP/s: 4 operations a weight and token, forward and backward: about 110 ms."""
    ids = (np.arange(512) % 300).astype(np.int32)
    times = []
    for layers in (1, 2):
        shape = LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers)
        with fake_model(TrainConfig(), shape, AbsentDevice("cuda", torch.bfloat16)) as fake:
            step = simulate_step(fake, [Example.of_text(ids)] * 4, checkpointed=False)
        times.append(step_time(find_cards("h100")[0], step.operators))
    layer, rest = times[1].products - times[0].products, 2 * times[0].products - times[1].products
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert layer == pytest.approx(4 * weights * 2048 / 594e12, rel=0.05)
    assert rest == pytest.approx(4 * 128256 * 4096 * 2048 / 594e12, rel=0.1)
    assert rest + 32 * layer == pytest.approx(0.110, rel=0.07)
    passes = (times[1].memory - times[0].memory) * BANDWIDTH_REACHED * 3.35e12 / (2048 * 4096 * 2)  # over 16-bit inputs
    assert 100 < passes < 500
