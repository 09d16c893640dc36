"""The graphics cards that `plan` knows without having one, and their memory.

Sizes are the manufacturers', in GB (10^9 bytes); real cards report a little more.
"""

import re
from collections import Counter
from dataclasses import dataclass

from tailora.errors import ConfigError, nearest

CONTEXT = 500_000_000  # assumed bytes that a process uses before torch allocates any: driver, loaded code
UNIFIED_SHARE = 2 / 3  # of a Mac's memory: Metal's recommended limit for its GPU up to 36 GB (above that 3/4)


@dataclass(frozen=True)
class Card:
    """memory: in GB.    device: its device type in torch."""

    name: str
    memory: int
    device: str = "cuda"
    has_bfloat16: bool = True

    @property
    def available_bytes(self) -> int:
        """The memory that a run may use. A Mac's memory is shared with everything else."""
        return int(self.memory * 1e9 * (UNIFIED_SHARE if self.device == "mps" else 1))


# Device type in torch -> card -> its memory sizes. A name that fits several cards means the first one.
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
        "MI300X": (192,),  # AMD's cards are "cuda" in torch, too
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

MAKER_NAMES = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|amd|radeon|instinct|apple|intel|data center|gpu|graphics|generation|hbm\d?\w?)\b"
)
LONGEST_NAME = 60


def find_cards(name: str) -> list[Card]:
    """Returns the cards that a name such as "h100", "RTX 4090" or "M2 Max 64GB" can mean, the usual one first.

    A name may omit parts of the card's name, and may add only the manufacturer's.
    Raises ConfigError with similar names if there is no such card.
    """
    asked = Counter(_parts(name))
    matches = [card for card in CARDS if asked <= Counter(_parts(card.name))] if asked else []
    if matches:
        return matches
    names = dict.fromkeys(re.sub(r" \d+GB$", "", card.name).lower() for card in CARDS)
    similar = nearest(" ".join(_words(name[:LONGEST_NAME])), names, cutoff=0.5)  # some names include the memory
    raise ConfigError(
        f"unknown graphics card {name[:LONGEST_NAME]!r}{similar or '; try for example H100, RTX 4090 or M2 Max'} "
        '(for all known cards, see "Will it fit?" in the docs)'
    )


def _words(name: str) -> list[str]:
    return MAKER_NAMES.sub(" ", name.lower()).split()


def _parts(name: str) -> list[str]:
    """Splits letters from numbers, so that "RTX4090" equals "RTX 4090", and "80 GB" equals "80GB"."""
    return re.findall(r"[a-z]+|\d+", " ".join(_words(name)))
