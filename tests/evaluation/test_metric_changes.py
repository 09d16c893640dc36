"""Metrics of answers before and after training: their statistics, and what is said of them."""

import numpy as np
import pytest
from scipy import stats

from tailora.evaluation.answers import answers_verdict, describe_faults, fault_changes, metric_changes
from tailora.train.answers import AnswerFacts, ComparedAnswer
from tailora.train.significance import Finding

LOOP = "Arrr! " * 60


def answers(
    before: list[float | None], after: list[float | None], *, clusters: list[int] | None = None, name: str = "right"
) -> list[ComparedAnswer]:
    return [
        ComparedAnswer(
            "a",
            "b",
            "c",
            before=AnswerFacts(2, False, {name: old}),
            after=AnswerFacts(2, False, {name: new}),
            cluster=number if clusters is None else clusters[number],
        )
        for number, (old, new) in enumerate(zip(before, after, strict=True))
    ]


def texts(pairs: list[tuple[str, str]], *, is_training: bool = False) -> list[ComparedAnswer]:
    facts = AnswerFacts(2, False)
    return [
        ComparedAnswer("a", old, new, before=facts, after=facts, cluster=number, is_training=is_training)
        for number, (old, new) in enumerate(pairs)
    ]


def shares(gained: int, lost: int, right: int = 10, wrong: int = 10) -> list[ComparedAnswer]:
    before = [0.0] * gained + [1.0] * lost + [1.0] * right + [0.0] * wrong
    after = [1.0] * gained + [0.0] * lost + [1.0] * right + [0.0] * wrong
    return answers([*before], [*after])


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (6, 0), (12, 3), (3, 12), (9, 8), (0, 0), (40, 11)])
def test_shares_are_tested_by_mcnemar(gained: int, lost: int) -> None:
    change = metric_changes(shares(gained, lost), {"right": True})["right"]
    n = gained + lost
    expected = stats.binomtest(gained, n).pvalue if n else 1.0
    assert change.p_value == pytest.approx(expected)
    assert (change.gained, change.lost, change.answers) == (gained, lost, n + 20)
    assert (change.finding != "cannot tell") == (expected < 0.05)
    assert change.before.value == pytest.approx((lost + 10) / (n + 20))


def test_answers_of_one_cluster_count_as_one() -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 5).tolist()
    before = random.normal(size=100)
    after = before + 0.3 + np.repeat(random.normal(size=20), 5)
    change = metric_changes(answers(before.tolist(), after.tolist(), clusters=clusters), {"right": True})["right"]
    means = (after - before).reshape(20, 5).mean(1)
    low, high = stats.t.interval(0.95, 19, means.mean(), stats.sem(means))
    assert change.change.interval == pytest.approx((means.mean(), low, high), abs=2e-3)
    alone = metric_changes(answers(before.tolist(), after.tolist()), {"right": True})["right"]
    assert alone.p_value < change.p_value


def test_lower_may_be_better() -> None:
    (change,) = metric_changes(shares(12, 1), {"right": False}).values()
    assert change.finding == "worse"


def test_further_metrics_are_adjusted_for_their_number() -> None:
    rows = []
    for number, answer in enumerate(shares(9, 1)):
        scores = [dict.fromkeys("abcd", part.scores["right"]) for _, part in answer.pairs]
        scores[1]["b"] = scores[0]["b"] if number < 2 else scores[1]["b"]  # two flips fewer
        before, after = (AnswerFacts(2, False, of_model) for of_model in scores)
        rows.append(ComparedAnswer("a", "b", "c", before=before, after=after, cluster=number))
    raw = {"a": stats.binomtest(9, 10).pvalue, "b": stats.binomtest(7, 8).pvalue}
    changes = metric_changes(rows, dict.fromkeys("abcd", True))
    assert changes["a"].p_value == pytest.approx(raw["a"])  # the first one decides alone
    assert changes["c"].p_value == changes["d"].p_value == pytest.approx(3 * raw["a"])
    assert changes["b"].p_value == pytest.approx(max(raw["b"], 3 * raw["a"]))
    assert changes["c"].finding == "cannot tell" != changes["a"].finding


@pytest.mark.parametrize(("missing", "finding"), [(1, "better"), (2, "cannot tell")])
def test_answers_without_a_score_are_left_out_up_to_a_share(missing: int, finding: Finding) -> None:
    rows = answers([0.0] * 20 + [None] * missing, [1.0] * 20 + [0.0] * missing)
    change = metric_changes(rows, {"right": True})["right"]
    assert (change.answers, change.finding) == (20, finding)
    said = answers_verdict({"right": change}, {}, "better", "N")[1]
    assert f"{'because' if missing == 2 else ';'} {missing / (20 + missing):.1%} of the answers have no score" in said


@pytest.mark.parametrize(
    ("rows", "loss", "finding", "said"),
    [
        (shares(12, 1), "better", "better", "Better: right rose from 33% to 67% (+13 to +50 points, N); 12 answers"),
        (shares(1, 12), "better", "worse", "The loss says the opposite, but right decides."),
        (shares(3, 2), "better", "cannot tell", "A lower loss alone does not show that the answers are better."),
        (answers([0.0] * 9, [0.0] * 9), "better", "cannot tell", "Every answer got 0 from right, before and after;"),
        (answers([0.5] * 9, [0.75] * 9), "worse", "better", "right rose from 0.500 to 0.750 (+0.250 to +0.250, N)."),
    ],
)  # fmt: skip
def test_the_first_metric_decides(rows: list[ComparedAnswer], loss: Finding, finding: Finding, said: str) -> None:
    result, text = answers_verdict(metric_changes(rows, {"right": True}), {}, loss, "N")
    assert result == finding
    assert said in text
    assert text.startswith(finding.capitalize())


@pytest.mark.parametrize(("loops", "of", "withheld"), [(2, 20, False), (3, 20, True), (5, 100, True), (4, 100, False)])
def test_better_is_withheld_if_answers_repeat_themselves(loops: int, of: int, withheld: bool) -> None:
    faults = fault_changes(texts([("fine", LOOP)] * loops + [("fine", "fine")] * (of - loops)))
    assert faults["loop"].after == pytest.approx(loops / of)
    finding, text = answers_verdict({}, faults, "better", "N")
    assert finding == ("cannot tell" if withheld else "better")
    assert text == ("The loss fell, but the answers repeat themselves." if withheld else "")
    assert ("repeat themselves (0% before): train for" in describe_faults(faults)) == withheld
    assert answers_verdict({}, faults, "worse", "N") == ("worse", "")


def test_faults_that_the_base_has_too_are_named_but_do_not_decide() -> None:
    faults = fault_changes(texts([(LOOP, LOOP)] * 3 + [("fine", "")] + [("fine", "fine")] * 8))
    assert answers_verdict({}, faults, "better", "N")[0] == "better"
    assert describe_faults(faults).startswith(
        "25% of the answers to 12 held-out prompts repeat themselves (25% before)"
    )
    assert "empty" not in describe_faults(faults)


@pytest.mark.parametrize(("each", "withheld"), [(1, False), (2, True)])
def test_faults_of_several_kinds_count_together(each: int, withheld: bool) -> None:
    """Two kinds of 7% are 13 points; one alone would not be too many."""
    faults = fault_changes(texts([("fine", LOOP), ("fine", "")] * each + [("fine", "fine")] * (30 - 2 * each)))
    finding, text = answers_verdict({}, faults, "better", "N")
    assert finding == ("cannot tell" if withheld else "better")
    assert ("are empty and repeat themselves" in text) == withheld
    many = fault_changes(texts([(LOOP, LOOP), ("", "")] * 4 + [(LOOP, LOOP)] + [("fine", "fine")] * 26))
    assert describe_faults(many).startswith("14% of the answers to 35 held-out prompts repeat themselves (14% before)")


def test_training_prompts_show_faults_that_few_held_out_prompts_do_not() -> None:
    faults = fault_changes(texts([("fine", "fine")] * 3) + texts([("fine", LOOP)] * 6, is_training=True))
    assert faults["loop"].is_training
    assert "100% of the answers to 6 training prompts repeat themselves" in describe_faults(faults)
    assert not metric_changes(texts([("fine", "fine")], is_training=True), {"right": True})


def test_answers_of_earlier_versions_have_no_faults() -> None:
    assert fault_changes([ComparedAnswer("a", "", "")]) == {}
