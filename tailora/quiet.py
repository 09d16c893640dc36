"""Keeps the progress bars and log lines of other packages out of our output. Needs no torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TORCHAO_LOGGERS = ("torchao", "torch.utils._pytree")  # they warn when torchao is imported


@contextmanager
def quiet_transformers(*, warnings: bool = True) -> Iterator[None]:
    """Within the block, transformers shows no progress bars, and with warnings=False no warnings. Errors are raised."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not warnings:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def silent_loggers(*names: str) -> Iterator[None]:
    """Within the block, these loggers and their children print nothing, regardless of their levels."""
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = (
            [logging.NullHandler()],
            False,
        )  # without a handler, Python's last resort prints
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Within the block, these loggers only pass on errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
