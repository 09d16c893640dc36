"""Other packages without the lines that they write of their own. Needs no torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*, warnings: bool = True) -> Iterator[None]:
    """Without its progress bars for the block, and without its warnings too if so wished; errors are raised as ever."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    if not warnings:
        theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


@contextmanager
def hushed(*names: str) -> Iterator[None]:
    """Within the block the loggers of these names pass on errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
