import math

import pytest

from tailora.errors import ConfigError
from tailora.evaluation.metrics import METRICS, Gate, check_gates, parse_gates, parse_metrics


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("loss<1.3", Gate("loss", "<", 1.3)),
        (" loss <= 1.3 ", Gate("loss", "<=", 1.3)),
        ("acc_norm>6e-1", Gate("accuracy_norm", ">", 0.6)),
        ("ppl_change<-1", Gate("perplexity_change", "<", -1)),
        ("f1[very bad, a]>=.5", Gate("f1[very bad, a]", ">=", 0.5)),
        ("exact_match:ignore=case+space>.5", Gate("exact_match:ignore=case+space", ">", 0.5)),
        ("regex:<b>, .+</b>_change>=0", Gate("regex:<b>, .+</b>_change", ">=", 0)),
        ("json_schema:a/b.json>.9", Gate("json_schema:a/b.json", ">", 0.9)),
        ("gsm8k/acc>.9", Gate("gsm8k/acc", ">", 0.9, is_on_task=True)),
    ],
)
def test_a_gate_is_a_metric_a_sign_and_a_number(text: str, gate: Gate) -> None:
    assert parse_gates([text], ["regex:<b>, .+</b>", "json_schema:a/b.json"]) == [gate]


def test_several_gates() -> None:
    assert list(map(str, parse_gates(["loss<1.3,acc>.5", "polite>=1"]))) == ["loss<1.3", "accuracy>0.5", "polite>=1"]


def test_everything_that_is_no_gate_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gates(["loss", "loss=1", "loss<", "<1", "loss<x", "loss<nan", ""])
    assert "7 problems" in str(caught.value)
    assert "--gate 'loss': expected METRIC<NUMBER (or <=, >, >=); put it in quotes, because" in str(caught.value)


@pytest.mark.parametrize(
    ("sign", "met"), [("<", [True, False, False]), ("<=", [True, True, False]), (">=", [False, True, True])]
)
def test_a_bound_is_met_or_not(sign: str, met: list[bool]) -> None:
    assert [Gate("loss", sign, 1.0).is_met(value) for value in (0.5, 1.0, 1.5)] == met
    assert not Gate("loss", sign, 1.0).is_met(math.nan)


def test_an_unknown_metric_names_the_nearest() -> None:
    known = list(METRICS)
    with pytest.raises(ConfigError, match=r"--gate los<1: unknown metric 'los'; did you mean loss"):
        check_gates(parse_gates(["los<1"]), known, base=True)
    with pytest.raises(ConfigError, match="unknown metric 'f1'; available: loss, perplexity, accuracy"):
        check_gates(parse_gates(["f1>.5"]), known, base=True)
    with pytest.raises(ConfigError, match="--metric: unknown metric 'acuracy'; did you mean accuracy"):
        parse_metrics(["loss", "acuracy"], ["regex"])
    with pytest.raises(ConfigError, match="a change requires an adapter and its base"):
        check_gates(parse_gates(["loss_change<0"]), known, base=False)
    with pytest.raises(ConfigError, match="unknown metric 'perplexity_change'"):
        check_gates(parse_gates(["perplexity_change<0"]), known, base=True)
    check_gates(parse_gates(["loss_change<0", "task/acc>0"]), [*known, "task/acc"], base=True)


def test_names_and_their_short_forms() -> None:
    judges = ["regex:a,b", "a.py:loss", "exact_match"]
    scores = ["loss", "accuracy", "accuracy_norm", "f1[a,b]"]
    texts = ["loss,acc", judges[0], "acc_norm", judges[1], "choice", "f1[a,b]", judges[2]]
    assert parse_metrics(texts, ["regex", "exact_match"]) == (scores, judges)
