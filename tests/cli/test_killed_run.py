"""A run with metrics that is killed continues to the same bits and asks its judge nothing twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from judge_server import fake_judge

from tailora.cli import train as command
from tailora.errors import WORSE
from tailora.formats.run_folder import ADAPTER, SAMPLES, VERDICTS, checkpoints_in
from tailora.train.run_log import HOLDER
from tailora.train.sampler import Sampler
from tailora.train.trainer import Trainer

LIMIT, JUDGED = 8, 5  # tokens of an answer, verdicts when the run is killed


def train(*tokens: object) -> dict[str, Any]:
    code, said, told = call("train", *tokens, "--json")
    assert code in (0, WORSE), told  # the fake judge prefers longer answers
    return dict(json.loads(said.splitlines()[-1]))


@pytest.mark.slow
def test_a_run_that_is_killed_at_seven_places_ends_with_the_same_bits(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed leaves what its folder contains at that moment."""
    whole, places = tmp_path / "whole", list[str]()

    def kill(place: str) -> None:
        """Copies the folder of the first run when it gets to this place for the first time."""
        if place not in places and not places.count("end"):
            places.append(place)
            shutil.copytree(whole, tmp_path / place, ignore=shutil.ignore_patterns(HOLDER))

    def kill_in(owner: Any, name: str, place: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def killed(*arguments: Any, **options: Any) -> Any:
            if where := place(*arguments, **options):
                kill(where)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, killed)

    kill_in(Trainer, "evaluate_before_training", lambda _: "before training")
    kill_in(Trainer, "step", lambda trainer, *_: "training" * (trainer.submitted_steps == 3))
    kill_in(Trainer, "evaluate_and_keep_best", lambda trainer: "evaluating" * (trainer.submitted_steps == 4))
    side = {False: "first answers", True: "second answers"}
    kill_in(Sampler, "answer", lambda _, __, limit, base=False, **___: side[base] * (limit == LIMIT))
    kill_in(command, "write_results", lambda *_: "before the report")
    (tmp_path / "m.py").write_text(
        "def words(completions, **_):\n    return [len(c[0]['content']) for c in completions]"
    )
    tokens = ["--model", tiny_model, "--data", chats, "--max-steps", 4, "--validation-split", 0.25]
    tokens += [
        "--learning-rate",
        1e-2,
        "--per-device-train-batch-size",
        8,
        "--eval-steps",
        2,
        "--save-steps",
        2,
        "--max-completion-length",
        LIMIT,
    ]
    with fake_judge(monkeypatch) as server:

        def prefer_longer(a: str, b: str) -> str:
            if len(server.requests) == JUDGED + 2:
                kill("judging")
            return "[[A]]" if len(a) > len(b) else "[[B]]"

        server.reply = prefer_longer
        tokens += ["--metric", f"judge:{server.url}", "--judge-model", "fake", "--metric", f"{tmp_path}/m.py:words"]
        result = train(*tokens, "--output-dir", whole)
        needed, places = result["judge"]["requests"], [*places, "end"]
        assert needed == len(server.requests) - 1 > JUDGED + 2
        assert len(places) == 8
        for place in places[:-1]:
            folder, sent = tmp_path / place, len(server.requests)
            resumed = bool(checkpoints_in(folder))
            known = (folder / VERDICTS).read_text().splitlines() if (folder / VERDICTS).exists() else []
            known = [line for line in known if line.endswith("}") and json.loads(line)["verdict"] in ("A", "B")]
            how = ["--resume-from-checkpoint", "latest"] if resumed else ["--overwrite"]
            again = train(*tokens, "--output-dir", folder, *how)
            assert len(server.requests) - sent == needed - len(known) + (place != "before the report"), place
            assert bool(known) == (place in ("judging", "before the report"))
            assert again["judge"]["cached"] == len(known)
            for name in (f"{ADAPTER}/adapter_model.safetensors", SAMPLES):
                assert (folder / name).read_bytes() == (whole / name).read_bytes(), place
            assert {key: again[key] for key in ("metrics", "verdict", "finding", "eval_loss_after")} == {
                key: result[key] for key in ("metrics", "verdict", "finding", "eval_loss_after")
            }
