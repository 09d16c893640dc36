"""The graphics cards that a plan can be made for without having one, and how long a step takes on one.

All figures are the makers': memory in GB (10^9 bytes: cards show a little more), bandwidth in GB/s, and the peak of
dense products in TFLOP/s, of 16 bits with sums in float32 and of float32 without TF32. Makers print peaks with 2:4
sparsity, which is half of the numbers zero; here they are halved. Times that follow from a table were never measured.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tailora.train.memory_tracker import Operator  # which loads torch

PRODUCTS_REACHED = 0.6  # of the peak, by large products: 600 of 989 TFLOP/s on an H100
BANDWIDTH_REACHED = 0.9  # of the data sheet's, by large copies: 3 of 3.35 TB/s on an H100
LAUNCH = 5e-6  # seconds to start one kernel from Python; below that the card waits for the host
CONTEXT = 500_000_000  # bytes of a card that a process takes before torch allocates any: driver, loaded code; assumed
UNIFIED_SHARE = 2 / 3  # of a Mac's memory: what Metal recommends for its GPU up to 36 GB (above it is 3/4)


@dataclass(frozen=True)
class Card:
    """memory: GB.    bandwidth: GB/s.    peak_16, peak_32: TFLOP/s of products.    device: its type in torch."""

    name: str
    memory: float
    bandwidth: float
    peak_16: float
    peak_32: float
    has_bfloat16: bool = True
    device: str = "cuda"

    @property
    def available_bytes(self) -> int:
        """What a run may take of the memory. A Mac's is shared with everything else."""
        return int(self.memory * 1e9 * (UNIFIED_SHARE if self.device == "mps" else 1))

    def __str__(self) -> str:
        return f"{self.name} ({self.memory:g} GB, {self.bandwidth:,g} GB/s, {self.peak_16:,g} TFLOP/s in 16 bits)"


DATA_CENTER = [  # the data sheet of each card, at nvidia.com/en-us/data-center
    Card("T4 16GB", 16, 320, 65, 8.1, has_bfloat16=False),
    Card("V100 SXM2 16GB", 16, 900, 125, 15.7, has_bfloat16=False),
    Card("V100 SXM2 32GB", 32, 900, 125, 15.7, has_bfloat16=False),
    Card("V100 PCIe 16GB", 16, 900, 112, 14, has_bfloat16=False),
    Card("A10 24GB", 24, 600, 125, 31.2),
    Card("A10G 24GB", 24, 600, 70, 35),  # made for Amazon's g5
    Card("A30 24GB", 24, 933, 165, 10.3),
    Card("A40 48GB", 48, 696, 149.7, 37.4),
    Card("A100 SXM4 40GB", 40, 1555, 312, 19.5),
    Card("A100 SXM4 80GB", 80, 2039, 312, 19.5),
    Card("A100 PCIe 80GB", 80, 1935, 312, 19.5),
    Card("L4 24GB", 24, 300, 121, 30.3),
    Card("L40 48GB", 48, 864, 181, 90.5),
    Card("L40S 48GB", 48, 864, 362, 91.6),
    Card("H100 SXM 80GB", 80, 3350, 989.4, 67),
    Card("H100 PCIe 80GB", 80, 2000, 756, 51),
    Card("H100 NVL 94GB", 94, 3900, 835, 60),
    Card("H200 141GB", 141, 4800, 989.4, 67),
    Card("B200 180GB", 180, 8000, 2250, 75),  # DGX B200's, an eighth
]
WORKSTATION = [  # data sheets; the whitepapers of Ada (professional) and Blackwell (RTX PRO)
    Card("RTX A6000 48GB", 48, 768, 154.8, 38.7),
    Card("RTX 6000 Ada 48GB", 48, 960, 364.2, 91.1),
    Card("RTX PRO 6000 Blackwell 96GB", 96, 1792, 503.8, 126),
]
# NVIDIA's whitepapers of Turing, GA102, Ada and RTX Blackwell, and product pages for the cards that these leave out.
# Products of 16 bits with sums in float32 are twice as fast as those of float32 in each of the whitepapers from GA102
# on: GeForce cards have half of the rate that the same chip has in a workstation.
GEFORCE = [
    Card("RTX 2080 Ti 11GB", 11, 616, 53.8, 13.4, has_bfloat16=False),
    *(
        Card(f"RTX {name} {memory}GB", memory, bandwidth, 2 * peak_32, peak_32)
        for name, memory, bandwidth, peak_32 in [
            ("3060", 12, 360, 12.7),
            ("3070", 8, 448, 20.3),
            ("3080", 10, 760, 29.8),
            ("3090", 24, 936, 35.6),
            ("3090 Ti", 24, 1008, 40),
            ("4060", 8, 272, 15.1),
            ("4060 Ti", 16, 288, 22.1),
            ("4070", 12, 504, 29.1),
            ("4070 Super", 12, 504, 35.5),
            ("4070 Ti", 12, 504, 40.1),
            ("4070 Ti Super", 16, 672, 44.1),
            ("4080", 16, 717, 48.7),
            ("4080 Super", 16, 736, 52.2),
            ("4090", 24, 1008, 82.6),
            ("5060 Ti", 16, 448, 23.7),
            ("5070", 12, 672, 30.9),
            ("5070 Ti", 16, 896, 43.9),
            ("5080", 16, 960, 56.3),
            ("5090", 32, 1792, 104.8),
        ]
    ),
]
AMD = [  # data sheets at amd.com; torch calls AMD's cards "cuda", too
    Card("MI300X 192GB", 192, 5300, 1307.4, 163.4),
    Card("MI325X 256GB", 256, 6000, 1307.4, 163.4),
    Card("RX 7900 XTX 24GB", 24, 960, 123, 61),
]
# Intel's product pages. They give products of int8 for Arc, 16 bits have half of that rate; float32 and all of the
# Max 1100, follow from units and clock.
INTEL = [
    Card("Arc A770 16GB", 16, 560, 131, 17.2, device="xpu"),
    Card("Arc B580 12GB", 12, 456, 116.5, 13.7, device="xpu"),
    Card("Max 1100 48GB", 48, 1229, 355, 22.2, device="xpu"),
]
# Apple's announcements of each chip: sizes of memory and bandwidth. Of the GPU's speed Apple has stated 2.6 (M1, 8
# cores), 5.2 (16), 10.4 (32), 21 (64) and 3.6 TFLOP/s (M2, 10 cores), and nothing since: later chips are taken to be as
# fast as the M2's cores, .36 each, and may be faster. 16 bits are not faster than 32.
APPLE = [
    Card(f"{name} {memory}GB", memory, bandwidth, peak, peak, device="mps")
    for name, sizes, bandwidth, peak in [
        ("M1", (8, 16), 68, 2.6),
        ("M1 Pro", (16, 32), 200, 5.2),
        ("M1 Max", (32, 64), 400, 10.4),
        ("M1 Ultra", (64, 128), 800, 21),
        ("M2", (8, 16, 24), 100, 3.6),
        ("M2 Pro", (16, 32), 200, 6.8),
        ("M2 Max", (32, 64, 96), 400, 13.7),
        ("M2 Ultra", (64, 128, 192), 800, 27.4),
        ("M3", (8, 16, 24), 100, 3.6),
        ("M3 Pro", (18, 36), 150, 6.5),
        ("M3 Max", (36, 96), 300, 10.8),
        ("M3 Max", (48, 64, 128), 400, 14.4),
        ("M3 Ultra", (96, 256, 512), 819, 28.8),
        ("M4", (16, 24, 32), 120, 3.6),
        ("M4 Pro", (24, 48, 64), 273, 7.2),
        ("M4 Max", (36,), 410, 11.5),
        ("M4 Max", (48, 64, 128), 546, 14.4),
    ]
    for memory in sizes
]
CARDS = [*DATA_CENTER, *WORKSTATION, *GEFORCE, *AMD, *INTEL, *APPLE]

OF_MAKERS = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|amd|radeon|instinct|apple|intel|data center|gpu|graphics|generation|hbm\d?\w?)\b"
)
LONGEST_NAME = 60


def find_cards(name: str) -> list[Card]:
    """Returns the cards that a name such as "h100", "RTX 4090" or "M2 Max 64GB" can mean, the usual one first.

    A name may leave parts out, but has none that the card's name lacks, except for the maker's.
    Raises ConfigError with similar names if there is none.
    """
    asked = Counter(_parts(name))
    matches = [card for card in CARDS if asked <= Counter(_parts(card.name))] if asked else []
    if matches:
        return matches
    names = dict.fromkeys(re.sub(r" \d+GB$", "", card.name).lower() for card in CARDS)
    similar = nearest(" ".join(_words(name[:LONGEST_NAME])), names, cutoff=0.5)  # the memory is a part of some names
    raise ConfigError(
        f"no card {name[:LONGEST_NAME]!r} is known{similar or '; known are H100, RTX 4090, MI300X, M2 Max and others'} "
        '("Will it fit?" in the docs lists all)'
    )


def _words(name: str) -> list[str]:
    return OF_MAKERS.sub(" ", name.lower()).split()


def _parts(name: str) -> list[str]:
    """Letters and numbers apart, so that "RTX4090" and "80 GB" are what "RTX 4090" and "80GB" are."""
    return re.findall(r"[a-z]+|\d+", " ".join(_words(name)))


# ---- How long a step takes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a forward and backward on a card: the card's work, and what the host takes to start the kernels."""

    products: float
    memory: float  # operators that are bound by the memory's bandwidth
    launches: float


def step_time(card: Card, operators: Mapping["Operator", int]) -> StepTime:
    """Returns the roofline time of operators: each takes as long as its products or its traffic, whichever is longer.

    operators: operator -> how often it runs.
    """
    products = memory = 0.0
    for operator, count in operators.items():
        peak = card.peak_32 if operator.dtype.itemsize > 2 else card.peak_16
        computing = operator.flops / (PRODUCTS_REACHED * peak * 1e12)
        moving = operator.bytes / (BANDWIDTH_REACHED * card.bandwidth * 1e9)
        if computing > moving:
            products += count * computing
        else:
            memory += count * moving
    return StepTime(products, memory, LAUNCH * sum(operators.values()))
