"""Extension of mkdocstrings: converts tailora's docstrings to Markdown, with lines `name: meaning` as a list."""

import re
from typing import Any

from griffe import Class, ExprCall, Extension, Object

ITEM = re.compile(r"(\w+(?:, \w+)*):\s+(.*)")
GAP = re.compile(r"\.? {3,}(?=\w+: )")  # between two items on one line


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, defaults(obj) if isinstance(obj, Class) else {})


def defaults(obj: Class) -> dict[str, str]:
    """Returns the defaults of the fields of a settings class, without their limits: 16 from `Field(16, ge=1)`."""
    values = {name: member.value for name, member in obj.attributes.items() if member.value is not None}
    return {
        name: str(value.arguments[0] if isinstance(value, ExprCall) and value.arguments else value)
        for name, value in values.items()
    }


def as_markdown(text: str, values: dict[str, str]) -> str:
    lines: list[str] = []
    for line in re.sub(GAP, ".\n", text).splitlines():
        item = ITEM.fullmatch(line)
        if item is None:
            lines.append(line)
            continue
        if lines and lines[-1].strip() and not lines[-1].startswith(("- ", "    ")):
            lines.append("")
        value = f" `= {values[item[1]]}`" if item[1] in values else ""
        lines.append(f"- **{item[1]}**{value}: {item[2]}")
    return "\n".join(lines)
