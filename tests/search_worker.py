"""A worker of a search in a process of its own (tests/study/test_search.py)."""

import json
import time
from pathlib import Path
from typing import Any

from tailora.study import optuna_study
from tailora.study.config import SearchConfig
from tailora.study.search import search
from tailora.study.trial import Listen, Trial, TrialSpec, run_here
from tailora.train.config import TrainConfig

HEARTBEAT, GRACE = 1, 10  # seconds


def work(train: dict[str, Any], study: dict[str, Any], log: Path, result: Path, *, stuck_in: str | None) -> None:
    """Takes part in the search. stuck_in: folder of the trial in which the worker stands still until it is killed."""
    optuna_study.HEARTBEAT, optuna_study.GRACE = HEARTBEAT, GRACE

    def run_trial(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
        if folder.name == stuck_in:
            time.sleep(600)
        return run_here(spec, folder, listen)

    def append(text: str) -> None:
        with log.open("a") as file:
            file.write(text + "\n")

    found = search(TrainConfig(**train), SearchConfig(**study), append, run_trial=run_trial)
    result.write_text(json.dumps(found.to_dict()))
