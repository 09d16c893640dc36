"""Leaves out the tests that are marked `exhaustive`, unless the command line's -m names that marker."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would wait for one another on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" in config.option.markexpr:
        return
    exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=exhaustive)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
