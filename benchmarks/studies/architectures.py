"""Tests tailora and PEFT on the architectures of transformers, with small models and random weights.

    python -m benchmarks.studies.architectures --minutes 30     writes or resumes results/architectures.json
    python -m benchmarks.studies.architectures --only LlamaForCausalLM BertForMaskedLM

The checks are in tests/architecture_checks.py. `update_docs.py` writes docs/compatibility.md from the result.
"""

import argparse
import json
import resource
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from benchmarks import measure

ALL = measure.RESULTS / "architectures.json"
BATCH = 8  # classes after which the result is saved and new processes start
MEMORY = 10 << 30  # bytes for a process: a class whose sizes no rule reduces does not take the machine down


def examine(class_name: str) -> dict[str, Any]:
    """Returns what each check says; {"base": reason} if the small base model itself does not run."""
    import torch
    import transformers
    from architecture_checks import CHECKS, ERRORS, batch_of, outcome, output_of, reason, small_model

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        base = small_model(class_name)
        with torch.no_grad():
            batch = batch_of(base)
            output, again = output_of(base, batch), output_of(base, batch)
    except ERRORS as error:
        return {"base": reason(error)}
    if not output.isfinite().all() or not torch.equal(output, again):
        return {"base": "its output is random, or not finite"}
    cells = {name: outcome(name, class_name) for name in CHECKS}
    torch._dynamo.reset()  # which keeps the models of all classes that it compiled
    return {"model_type": base.config.model_type, **cells, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    from architecture_checks import class_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no architecture after this time")
    parser.add_argument("--only", nargs="+", default=[], metavar="CLASS", help="run only these, again")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    found = json.loads(ALL.read_text())["architectures"] if ALL.exists() else {}
    names = class_names()
    waiting = options.only or [name for name in names if name not in found]
    end = time.monotonic() + 60 * options.minutes
    while waiting and time.monotonic() < end:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            running: dict[Future[dict[str, Any]], str] = {pool.submit(examine, name): name for name in batch}
            for future in as_completed(running):
                try:
                    found[running[future]] = future.result()
                except BrokenProcessPool:  # one of these classes ended it; --only runs the others again
                    found[running[future]] = {"base": "its process ended"}
                measure.log(f"{running[future]} {found[running[future]]}")
        not_run = [name for name in names if name not in found]
        measure.write(ALL, {"architectures": {name: found[name] for name in sorted(found)}, "not_run": not_run})


if __name__ == "__main__":
    main()
