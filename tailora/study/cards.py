"""The graphics cards that a plan can be made for without having one, and how much memory each has.

Sizes are the makers', in GB (10^9 bytes); cards show a little more.
"""

import re
from collections import Counter
from dataclasses import dataclass

from tailora.errors import ConfigError, nearest

CONTEXT = 500_000_000  # bytes of a card that a process takes before torch allocates any: driver, loaded code; assumed
UNIFIED_SHARE = 2 / 3  # of a Mac's memory: what Metal recommends for its GPU up to 36 GB (above it is 3/4)


@dataclass(frozen=True)
class Card:
    """memory: GB.    device: its type in torch."""

    name: str
    memory: int
    device: str = "cuda"
    has_bfloat16: bool = True

    @property
    def available_bytes(self) -> int:
        """What a run may take of the memory. A Mac's is shared with everything else."""
        return int(self.memory * 1e9 * (UNIFIED_SHARE if self.device == "mps" else 1))


# Type of device in torch -> card -> its sizes of memory. If a name fits several cards, the first one is meant.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {
        "T4": (16,),
        "V100 SXM2": (16, 32),
        "V100 PCIe": (16,),
        "A10": (24,),
        "A10G": (24,),
        "A30": (24,),
        "A40": (48,),
        "A100 SXM4": (40, 80),
        "A100 PCIe": (80,),
        "L4": (24,),
        "L40": (48,),
        "L40S": (48,),
        "H100 SXM": (80,),
        "H100 PCIe": (80,),
        "H100 NVL": (94,),
        "H200": (141,),
        "B200": (180,),
        "RTX A6000": (48,),
        "RTX 6000 Ada": (48,),
        "RTX PRO 6000 Blackwell": (96,),
        "RTX 2080 Ti": (11,),
        "RTX 3060": (12,),
        "RTX 3070": (8,),
        "RTX 3080": (10,),
        "RTX 3090": (24,),
        "RTX 3090 Ti": (24,),
        "RTX 4060": (8,),
        "RTX 4060 Ti": (16,),
        "RTX 4070": (12,),
        "RTX 4070 Super": (12,),
        "RTX 4070 Ti": (12,),
        "RTX 4070 Ti Super": (16,),
        "RTX 4080": (16,),
        "RTX 4080 Super": (16,),
        "RTX 4090": (24,),
        "RTX 5060 Ti": (16,),
        "RTX 5070": (12,),
        "RTX 5070 Ti": (16,),
        "RTX 5080": (16,),
        "RTX 5090": (32,),
        "MI300X": (192,),  # torch calls AMD's cards "cuda", too
        "MI325X": (256,),
        "RX 7900 XTX": (24,),
    },
    "xpu": {"Arc A770": (16,), "Arc B580": (12,), "Max 1100": (48,)},
    "mps": {
        "M1": (8, 16),
        "M1 Pro": (16, 32),
        "M1 Max": (32, 64),
        "M1 Ultra": (64, 128),
        "M2": (8, 16, 24),
        "M2 Pro": (16, 32),
        "M2 Max": (32, 64, 96),
        "M2 Ultra": (64, 128, 192),
        "M3": (8, 16, 24),
        "M3 Pro": (18, 36),
        "M3 Max": (36, 48, 64, 96, 128),
        "M3 Ultra": (96, 256, 512),
        "M4": (16, 24, 32),
        "M4 Pro": (24, 48, 64),
        "M4 Max": (36, 48, 64, 128),
    },
}
WITHOUT_BFLOAT16 = {"T4", "V100 SXM2", "V100 PCIe", "RTX 2080 Ti"}  # before Ampere
CARDS = [
    Card(f"{name} {memory}GB", memory, device, name not in WITHOUT_BFLOAT16)
    for device, cards in SIZES.items()
    for name, sizes in cards.items()
    for memory in sizes
]

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
