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
    name: str
    memory: int  # in GB
    device: str = "cuda"  # its device type in torch
    has_bfloat16: bool = True

    @property
    def available_bytes(self) -> int:
        """The memory that a run may use. A Mac's memory is shared with everything else."""
        return int(self.memory * 1e9 * (UNIFIED_SHARE if self.device == "mps" else 1))


# Device type in torch -> its cards. A name that fits several cards means the first one. AMD's cards are "cuda", too.
NAMES = {
    "cuda": """
        T4 16GB, V100 SXM2 16GB, V100 SXM2 32GB, V100 PCIe 16GB, A10 24GB, A10G 24GB, A30 24GB, A40 48GB,
        A100 SXM4 40GB, A100 SXM4 80GB, A100 PCIe 80GB, L4 24GB, L40 48GB, L40S 48GB,
        H100 SXM 80GB, H100 PCIe 80GB, H100 NVL 94GB, H200 141GB, B200 180GB,
        RTX A6000 48GB, RTX 6000 Ada 48GB, RTX PRO 6000 Blackwell 96GB,
        RTX 2080 Ti 11GB, RTX 3060 12GB, RTX 3070 8GB, RTX 3080 10GB, RTX 3090 24GB, RTX 3090 Ti 24GB,
        RTX 4060 8GB, RTX 4060 Ti 16GB, RTX 4070 12GB, RTX 4070 Super 12GB, RTX 4070 Ti 12GB,
        RTX 4070 Ti Super 16GB, RTX 4080 16GB, RTX 4080 Super 16GB, RTX 4090 24GB,
        RTX 5060 Ti 16GB, RTX 5070 12GB, RTX 5070 Ti 16GB, RTX 5080 16GB, RTX 5090 32GB,
        MI300X 192GB, MI325X 256GB, RX 7900 XTX 24GB""",
    "xpu": "Arc A770 16GB, Arc B580 12GB, Max 1100 48GB",
    "mps": """
        M1 8GB, M1 16GB, M1 Pro 16GB, M1 Pro 32GB, M1 Max 32GB, M1 Max 64GB, M1 Ultra 64GB, M1 Ultra 128GB,
        M2 8GB, M2 16GB, M2 24GB, M2 Pro 16GB, M2 Pro 32GB, M2 Max 32GB, M2 Max 64GB, M2 Max 96GB,
        M2 Ultra 64GB, M2 Ultra 128GB, M2 Ultra 192GB,
        M3 8GB, M3 16GB, M3 24GB, M3 Pro 18GB, M3 Pro 36GB, M3 Max 36GB, M3 Max 48GB, M3 Max 64GB, M3 Max 96GB,
        M3 Max 128GB, M3 Ultra 96GB, M3 Ultra 256GB, M3 Ultra 512GB,
        M4 16GB, M4 24GB, M4 32GB, M4 Pro 24GB, M4 Pro 48GB, M4 Pro 64GB,
        M4 Max 36GB, M4 Max 48GB, M4 Max 64GB, M4 Max 128GB""",
}
WITHOUT_BFLOAT16 = {"T4", "V100 SXM2", "V100 PCIe", "RTX 2080 Ti"}  # before Ampere
CARDS = [
    Card(f"{name} {memory}GB", int(memory), device, name not in WITHOUT_BFLOAT16)
    for device, names in NAMES.items()
    for name, memory in re.findall(r"(\w[^,]*) (\d+)GB", names)
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
