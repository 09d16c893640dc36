"""Leaves out tests with a marker of LEFT_OUT, unless -m on the command line names it.

The other tests mean the CPU, also on a machine with a card: without `-m gpu` they see no other device.
Tests with random input (hypothesis) run on a few inputs, always the same; with `-m exhaustive` on many new ones.
`-m device` installs the pretend accelerator, so that all tests of that process see it.
"""

import gc
import logging
import os
import re
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

# two workers with two threads each would wait for one another on two cores; torch reads this when it is loaded
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# processes that tests start would compile all modules each time, which nobody's installed package does
os.environ["USE_HUB_KERNELS"] = "0"  # tests load models without tailora, too
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import limits
import on_device
import pretend_accelerator
import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.site import chromium
from tailora.quiet import TORCHAO_LOGGERS

for name in TORCHAO_LOGGERS:  # processes of xdist print at their start
    logging.getLogger(name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LEFT_OUT = ("exhaustive", "ranks", "trainers", "pages", "notebooks", "network", "device", "gpu")
COMMON = {
    "deadline": 20_000,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
}  # deadline: ms for an input
settings.register_profile("default", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("exhaustive", max_examples=1000, print_blob=True, **COMMON)


def chosen(config: pytest.Config, marker: str) -> bool:
    """True if the command line's -m asks for the tests with this marker."""
    return re.search(rf"(?<!not )\b{marker}\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    limits.terminal = os.dup(2)  # pytest captures 2 from here on
    settings.load_profile("exhaustive" if chosen(config, "exhaustive") else "default")
    if not chosen(config, "gpu"):
        hide_devices()
    if chosen(config, "device") and not pretend_accelerator.missing():
        config.pluginmanager.register(TestsOnDevice())


def hide_devices() -> None:
    """Hides this machine's cards from torch, also in the processes that tests start."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for kind in {"xpu", "mps", getattr(torch.accelerator.current_accelerator(), "type", "xpu")} - {"cuda"}:
        torch.get_device_module(kind).device_count = lambda: 0


class TestsOnDevice:
    """Adds the tests that can run on the pretend accelerator to those that are written for it."""

    def __init__(self) -> None:
        self.device = pretend_accelerator.install()
        del os.environ["ACCELERATE_USE_CPU"]

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Module):  # its tensors are made when it is imported, which is next
            on_device.set_default_device(collector.path, self.device)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        on_device.set_default_device(item.path, self.device)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        unfit = {"slow", "gpu", "exhaustive", "ranks", "trainers", "network"}
        for item in items:
            if on_device.runs(item.nodeid.removeprefix("tests/")) and not unfit & {m.name for m in item.iter_markers()}:
                item.add_marker(pytest.mark.device)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen(config, "exhaustive"):
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(pytest.mark.exhaustive)
        return
    left_out = {name for name in LEFT_OUT if not chosen(config, name)}
    chosen_items, deselected = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        is_left_out = left_out & {mark.name for mark in item.iter_markers()}
        (deselected if is_left_out else chosen_items).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = chosen_items


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps Python's garbage collector from the modules and the tests.

    While they are imported it would run for seconds, and afterwards each pass over them would take a second.
    """
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(scope="module", autouse=True)
def keep_imports_from_the_collector() -> None:
    """Freezes what was imported since the last file, too. transformers collects all garbage when an engine stops."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, without a window. The tests that use it have the marker `browser`."""
    if chromium.program() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium.launched() as browser:
        yield browser
