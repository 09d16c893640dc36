"""Leaves out the tests that are marked `exhaustive` or `device`, unless the command line's -m names that marker.

Tests with random input (hypothesis) run on a few inputs, always the same; with `-m exhaustive` on many new ones.
`-m device` installs the pretend accelerator, so that all tests of that process see it.
"""

import logging
import os
import re

import limits
import pretend_accelerator
import pytest
from hypothesis import HealthCheck, settings

from tailora.quiet import TORCHAO_LOGGERS

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would wait for one another on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in TORCHAO_LOGGERS:  # processes of xdist print at their start
    logging.getLogger(name).setLevel(logging.ERROR)

COMMON = {
    "deadline": 20_000,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}  # deadline: ms for an input
settings.register_profile("default", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("exhaustive", max_examples=1000, print_blob=True, **COMMON)


def chosen(config: pytest.Config, marker: str) -> bool:
    """True if the command line's -m asks for the tests with this marker."""
    return re.search(rf"(?<!not )\b{marker}\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    limits.terminal = os.dup(2)  # pytest captures 2 from here on
    settings.load_profile("exhaustive" if chosen(config, "exhaustive") else "default")
    if chosen(config, "device") and not pretend_accelerator.missing():
        pretend_accelerator.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen(config, "exhaustive"):
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(pytest.mark.exhaustive)
        return
    left_out = {name for name in ("exhaustive", "device") if not chosen(config, name)}
    deselected = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
