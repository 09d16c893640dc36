"""A judge on a real server: its biases show, its failures are counted, and no verdict is bought twice."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import KEY, Server, fake_judge

from tailora.errors import ConfigError, ServerError
from tailora.evaluation import judge as module
from tailora.evaluation.answers import answers_verdict, metric_changes
from tailora.evaluation.judge import Judge
from tailora.train.answers import AnswerFacts, ComparedAnswer, Question
from tailora.train.config import TrainConfig
from tailora.train.generate import EncodedPrompt


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with fake_judge(monkeypatch) as server:
        yield server


def judged(
    server: Server, folder: Path, lengths: list[tuple[int, int]]
) -> tuple[Judge, list[ComparedAnswer], list[str]]:
    """Judges answers with these numbers of letters."""
    folder.mkdir(exist_ok=True)
    facts, notes = AnswerFacts(2, False), list[str]()
    rows = [
        ComparedAnswer(f"p{i}", "x" * base, "x" * tuned, before=facts, after=facts, cluster=i)
        for i, (base, tuned) in enumerate(lengths)
    ]
    questions = [Question(EncodedPrompt(row.prompt, [1]), row.prompt) for row in rows]
    config = TrainConfig(metric=[f"judge:{server.url}"], judge_model="fake", output_dir=str(folder))
    judge = Judge(config, notes.append)
    return judge, judge.compare(rows, questions, lambda _done, _total: None), notes


def test_biases_by_order_and_length_show_and_verdicts_are_cached(server: Server, tmp_path: Path) -> None:
    server.reply = lambda a, b: "[[A]]" if len(a) + 30 > len(b) else "[[A]] is short: [[b]]"
    random = np.random.default_rng(0)
    lengths = [(100, int(100 + d)) for d in random.normal(40, 60, 60).round()]
    _, answers, notes = judged(server, tmp_path, lengths)
    change = metric_changes(answers, {"judge": True})["judge"]
    wins = [0.5 + 0.5 * (d > 29) - 0.5 * (d < -29) for d in (new - old for old, new in lengths)]
    assert change.after.value == pytest.approx(np.mean(wins))
    assert change.change.interval.value == pytest.approx(np.mean(wins) - 0.5)
    assert change.finding == "better"  # by length alone, as the other numbers show
    near = [abs(new - old) < 30 for old, new in lengths if new != old]
    assert change.judge is not None
    assert change.judge.order_changed == pytest.approx(np.mean(near))
    assert change.judge.at_equal_length is not None
    rate, low, high = change.judge.at_equal_length
    assert rate == pytest.approx(0.5, abs=0.06)
    assert low < 0.5 < high < change.after.low
    assert change.to_dict()["win_rate_at_equal_length"] == {"value": rate, "low": low, "high": high}
    text = answers_verdict({"judge": change}, {}, "better", "60 held-out prompts")[1]
    assert text.startswith(f"Better: the judge preferred the tuned answers to {np.mean(wins):.0%} of 60 held-out")
    assert f"{np.mean(near):.0%} of its verdicts changed with the order; " in text
    sent = len(server.requests)
    assert f"sending {sent} requests" in notes[0]
    assert server.url in notes[0]
    assert sent == 2 * sum(old != new for old, new in lengths)
    cache = tmp_path / module.VERDICTS
    *verdicts, state = cache.read_text().splitlines()
    assert json.loads(state)["verdict"] == module.COMPLETE
    cache.write_text("\n".join(verdicts)[:-20])  # killed within a line
    assert judged(server, tmp_path, lengths)[1] == answers
    assert judged(server, tmp_path, lengths)[1] == answers
    assert len(server.requests) == sent + 1
    config = TrainConfig(metric=[f"judge:{server.url}/api/v1/"], judge_model="fake", output_dir=str(tmp_path))
    other = Judge(config, notes.append)
    assert other.url == f"{server.url}/api/v1/chat/completions"
    asked = Question(EncodedPrompt("p0", [1]), "p0"), Question(EncodedPrompt("p1", [1]), "p1", is_training=True)
    other.model = "other"  # with the verdicts of the first one in the file
    first, second = other.compare(answers[:2], asked, lambda _done, _total: None)
    assert (other.counts["requests"], first.judged, second) == (2, answers[0].judged, answers[1])


@pytest.mark.parametrize(
    ("reply", "problem"), [("Both are nice.", "malformed"), (500, "refusals"), (302, "refusals"), (401, "refusals")]
)
def test_failing_judges_are_asked_again_and_given_up(
    server: Server, tmp_path: Path, reply: str | int, problem: str
) -> None:
    failed = set[tuple[str, str]]()
    pairs = [(1, 2 + i) for i in range(40)]

    def once(a: str, b: str) -> str | int:
        is_first = (a, b) not in failed
        failed.add((a, b))
        return reply if is_first else "tie"

    server.reply = once
    judge, answers, _ = judged(server, tmp_path / "a", pairs)
    assert judge.counts == {"requests": 160, problem: 80, "cached": 0}
    assert {answer.judged for answer in answers} == {(0.5, 0.5)}
    assert sum("temperature" in request for request in server.requests) == 80
    server.reply = lambda _a, _b: reply
    judge, answers, notes = judged(server, tmp_path / "b", pairs)
    assert judge.counts[problem] == judge.counts["requests"] < 60  # of 240
    assert judge.counts["unjudged"] == 80
    assert not metric_changes(answers, {"judge": True})
    with pytest.raises(ServerError, match="has no verdict"):
        Judge(TrainConfig(metric=[f"judge:{server.url}"], judge_model="fake", output_dir="new"), notes.append).check()
    assert KEY not in "".join(notes)
    assert isinstance(reply, str) or "Bearer ***" in notes[-2]
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_slow_judges_time_out(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.05)
    is_over = threading.Event()
    server.reply = lambda _a, _b: "[[A]]" if is_over.wait(5) else ""
    judge, _, _ = judged(server, tmp_path, [(1, 2)])
    is_over.set()
    assert judge.counts == {"requests": 6, "timeouts": 6, "cached": 0, "unjudged": 2}


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"metric": ["judge:http://h"]}, "needs --judge-model"),
        ({"judge_model": "m"}, "add --metric judge:URL"),
        ({"task": "grpo", "reward": ["judge:http://h"]}, "never trained on"),
        ({"task": "grpo", "reward": ["math"], "metric": ["judge:http://h"], "judge_model": "m"}, "does not support"),
        ({"metric": ["judge:h"], "judge_model": "m"}, "expected an address"),
        ({"metric": ["judge:http://me:pw@h"], "judge_model": "m"}, "has a password"),
        ({"metric": ["judge:http://h"], "judge_model": "m", "judge_prompt": "/dev/null"}, "has no {prompt} and no"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(hint)):
        Judge(TrainConfig(**settings), lambda _: None)


def test_a_judge_is_tried_unless_all_its_verdicts_are_known(server: Server, tmp_path: Path) -> None:
    pairs = [(1, 2 + i) for i in range(10)]
    server.reply = lambda a, _: "tie" if a == "Five." or len(a) < 4 else 500
    judge, _, _ = judged(server, tmp_path, pairs)
    judge.check()  # some are missing
    assert server.requests.pop()["messages"][0]["content"].count("Four.") == 1
    server.reply = lambda _a, _b: "tie"
    sent, (judge, _, _) = len(server.requests), judged(server, tmp_path, pairs)
    asked = len(server.requests)
    judge.check()
    assert sent < asked == len(server.requests)
    judge.model = "other"
    judge.check()
    assert len(server.requests) == asked + 1


def test_verdicts_that_cannot_be_written_do_not_end_a_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_opened", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    judge, answers, notes = judged(server, tmp_path, [(1, 2)])
    assert (judge.counts["unjudged"], answers[0].judged) == (2, (None, None))
    assert "2 requests have no verdict. The last problem: cannot write" in notes[-1]
