"""Numbers as people read them."""

import math


def count(number: float) -> str:
    """1,234 -> 1,234; 4,884,480 -> 4.88M."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(number) >= size:
            scaled = number / (1e3 if name == "k" else size)
            return f"{scaled:.3g}{name}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit:
            return f"{number / unit:.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def rate(number: float) -> str:
    """A learning rate: 5e-4, 1.25e-3."""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def share(part: float, whole: float) -> str:
    percent = 100 * part / whole
    return f"{percent:.2g}%" if percent < 10 else f"{percent:.0f}%"


def signed(number: float, digits: int = 3) -> str:
    """With a minus as wide as the plus; what would be rounded to 0 shows its size."""
    lost = 0 < abs(number) < 0.5 * 10**-digits
    return (f"{number:+.1e}" if lost else f"{number:+.{digits}f}").replace("-", "−", 1)


def p_value(number: float) -> str:
    return "< .001" if number < 0.001 else f"{number:.3f}"


def between(low: float | None, high: float | None, form: str = ".3f") -> str:
    """'1.20 to 1.30', or '' where there is no spread to see."""
    if low is None or high is None or math.isnan(low):
        return ""
    return f"{low:{form}} to {high:{form}}"


def short(number: float) -> str:
    """As many decimals as its size needs."""
    return f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}"


def plural(number: int, word: str, several: str = "") -> str:
    return f"{number:,} {word if number == 1 else several or f'{word}s'}"


def setting(anything: object) -> str:
    """The value of one that was searched; rates are small numbers."""
    return rate(anything) if isinstance(anything, float) and 0 < anything < 0.01 else value(anything)


def value(anything: object) -> str:
    """A setting's."""
    match anything:
        case None:
            return "–"
        case bool():
            return "yes" if anything else "no"
        case float():
            return f"{anything:g}"
        case list() | tuple():
            return ", ".join(map(value, anything)) or "–"
        case dict():
            return ", ".join(f"{key}: {value(each)}" for key, each in anything.items()) or "–"
        case _:
            return str(anything)
