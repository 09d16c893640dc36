"""How long a step will take, before any: its work over what this machine multiplies in a second.

A rough rule: products of the model's own width are timed for a moment, and a step reaches SHARE of that speed.
"""

import time
from statistics import median

import torch

SHARE = 0.6  # of the products' speed that a step reaches; see benchmarks/plan.py
TURNS = 5


def products_per_second(tokens: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of (tokens, width) x (width, inner), a median of a few."""
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(inner, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(1 + TURNS):
        started = time.perf_counter()
        torch.mm(x, weight.T)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * tokens * width * inner / median(seconds[1:])
