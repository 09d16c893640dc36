"""Numbers and settings as text, for pages and for the terminal. `train.memory.format_bytes` formats bytes."""

import math
import re
from collections.abc import Callable

NONE = "–"  # in a table: there is no value
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Replaces control characters, which a terminal would execute, and surrogates, which no document may contain."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str, longest: int) -> str:
    """Replaces control characters, which XML forbids, with spaces; a long text loses its middle."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(clean) <= longest:
        return clean
    half = (longest - 1) // 2
    return f"{clean[:half]}…{clean[-half:]}"


def count(number: float) -> str:
    """1,234 -> '1,234'; 4,884,480 -> '4.88M'."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= 0.9995 * unit:  # which would be shown as 1000 of the smaller unit
            return f"{number / unit:.3g}{letter}"
    return f"{number / 1e3:.3g}k" if abs(number) >= 1e5 else f"{number:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.3g} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.1f} days"


def learning_rate(number: float) -> str:
    """0.0005 -> '5e-4'; 0.00125 -> '1.25e-3'."""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def share(part: float, whole: float) -> str:
    """As a percentage."""
    percent = 100 * part / whole
    return f"{percent:.2g}%" if percent < 10 else f"{percent:.0f}%"


def signed(number: float, digits: int = 3) -> str:
    """With its sign. A number that would be rounded to 0 is written with its exponent: -2.1e-05."""
    rounds_to_zero = 0 < abs(number) < 0.5 * 10**-digits
    return f"{number:+.1e}" if rounds_to_zero else f"{number:+.{digits}f}"


def p_value(number: float) -> str:
    return "< .001" if number < 0.001 else f"{number:.3f}"


def decimals(number: float | None) -> str:
    """Three decimals below 10, one above."""
    if number is None:
        return NONE
    return f"{round(number, 3) + 0.0:.3f}" if abs(number) < 10 else f"{number:,.1f}"  # never -0.000


def interval(ends: tuple[float | None, float | None] | None, show: Callable[[float], str] = "{:.3f}".format) -> str:
    """'1.200 to 1.300'; '' without an interval, or where its ends are None or NaN."""
    low, high = ends or (None, None)
    return "" if low is None or high is None or math.isnan(low) else f"{show(low)} to {show(high)}"


def plural(number: int, word: str, several: str = "") -> str:
    """'1 seed', '3 seeds'."""
    return f"{number:,} {word if number == 1 else several or f'{word}s'}"


def value_range(values: list[float]) -> str:
    """'4' or '4 to 16'; '–' for no value."""
    if not values:
        return NONE
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def setting(value: object) -> str:
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case float():
            return learning_rate(value) if 0 < value < 0.01 else f"{value:g}"
        case list() | tuple():
            return ", ".join(map(setting, value)) or NONE
        case dict():
            return ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) or NONE
        case _:
            return str(value)
