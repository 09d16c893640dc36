"""What a run's curves advise for the next one."""

import pytest

from tailora.report.run_advice import advice_of

STEPS = [3.0] * 40


def curve(*losses: float) -> list[tuple[int, float]]:
    return [(20 * number, loss) for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "rate", "flags"),
    [
        ((4.0, 3.0, 2.9, 2.96), 1e-3, ["--max-steps", "40"]),  # rose after step 40
        ((4.0, 3.0, 2.9, 2.94), 1e-3, []),  # hardly rose
        ((4.0, 3.0, 2.9, 2.89), 1e-3, ["--max-steps", "120"]),  # fell until the end
        ((4.0, 3.0, 2.95, 2.91), 1e-3, []),
        ((4.0, 3.0, 2.9, 2.89), 1e-4, ["--learning-rate", "3e-4"]),
        ((4.0, 4.1, 4.2, 4.3), 1e-3, []),  # not better than the base: `remedy_of` is for such runs
    ],
)
def test_the_curve_says_what_to_try(losses: tuple[float, ...], rate: float, flags: list[str]) -> None:
    text, found = advice_of({"learning_rate": rate}, STEPS, curve(*losses), 20)
    assert found == flags
    assert " ".join(flags) in text


def test_a_run_that_keeps_its_best_step_needs_no_fewer_steps() -> None:
    rising = curve(4.0, 3.0, 2.9, 2.96)
    assert advice_of({"learning_rate": 1e-3, "eval_steps": 20}, STEPS, rising, 20) == ("", [])
    assert advice_of({"learning_rate": 1e-3, "eval_steps": 0}, STEPS, rising, 20)[1] == ["--max-steps", "40"]


def test_few_examples_or_points_say_nothing() -> None:
    falling = curve(4.0, 3.0, 2.5, 2.0)
    assert advice_of({"learning_rate": 1e-3}, STEPS, falling, 19) == ("", [])
    assert advice_of({"learning_rate": 1e-3}, STEPS, falling[1:], 20) == ("", [])


def test_a_run_that_knows_its_rows_needs_more_of_them() -> None:
    level = curve(4.0, 2.45, 2.4, 2.4)
    text, flags = advice_of({"learning_rate": 1e-3}, [*STEPS[:30], *[1.1] * 10], level, 20)
    assert "more rows" in text
    assert not flags
    assert advice_of({"learning_rate": 1e-3}, [*STEPS[:30], *[1.3] * 10], level, 20)[0] == ""
