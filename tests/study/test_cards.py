"""The names of cards that are not here."""

import re
from pathlib import Path

import pytest

from tailora.errors import ConfigError
from tailora.study.cards import CARDS, find_cards


def test_every_card_is_found_by_its_own_name_and_is_in_the_documents() -> None:
    document = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    groups = re.findall(r"([\w ]+) \(([\d, ]+)\)(\*?)", document.partition("| kind | GPUs |")[2])
    listed = {f"{name.strip()} {size}GB": mark for name, sizes, mark in groups for size in sizes.split(", ")}
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert find_cards(card.name)[0] is card
        assert listed[card.name] == ("" if card.has_bfloat16 else "*")


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


def test_a_mac_s_memory_is_shared_with_everything_else() -> None:
    assert find_cards("M2 Max 96GB")[0].available_bytes == 64 * 10**9
    assert find_cards("Arc A770")[0].available_bytes == 16 * 10**9
    assert find_cards("RTX 4090")[0].available_bytes == 24 * 10**9
