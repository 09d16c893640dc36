"""The messages of errors that name a setting, found in the source: the cause and the remedy of each.

From each `raise` of an error of `tailora.errors`, a message is followed to the texts that it can have: through
variables, lists of problems, and functions that return them. No message is repeated here, so that none becomes old.
"""

import ast
import gc
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
DEPTH = 6  # of variables and functions between a raise and its text
Function = ast.FunctionDef | ast.AsyncFunctionDef
FLAG = re.compile(r"--[a-z][a-z-]*")
VALUE = r"(?= = | [A-Z][A-Z_]+\b)"  # what follows a setting whose name is also a plain word: its value
# A remedy is a clause that begins with one of these verbs, or else one that lists what there is.
DO = (
    "adapt it|add|call|change|check|choose|convert|correct|exclude|give|hold out|install|join|keep|launch|leave|load"
    "|look|lower|make|merge|name the|pass|pip install|quantise|raise|remove|resume|save|set|start|take|write|`tailora"
)
THERE_IS = "expected|methods that work|needed are|readable are|that fits is|there are"
ACTION = re.compile(rf"(?:^|[;:.,] |\n *)((?i:{DO})\b.*)|\n((?:a smaller )?--.*)", re.DOTALL)
CHOICE = re.compile(rf"[;:.,] ([^;:.,]*\b(?:{THERE_IS})\b.*)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """text: with the names of values in capitals.    settings: those that it names.    file, line: of the raise."""

    text: str
    error: str
    file: str
    line: int
    settings: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """What to do; '' if the message does not say it."""
        found = ACTION.search(self.text) or CHOICE.search(self.text)
        return "" if found is None else next(filter(None, found.groups()))

    @property
    def cause(self) -> str:
        """The message without its remedy."""
        return self.text.removesuffix(self.remedy).rstrip(" ;:,.(\n")


class Source:
    """The parsed files of a package, and what its names mean."""

    def __init__(self, folder: Path) -> None:
        self.files = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
        self.functions: dict[str, list[Function]] = {}
        self.calls: dict[str, list[tuple[ast.Call, Function | None]]] = {}
        self.constants: dict[str, list[ast.expr]] = {}
        self.bases: dict[str, set[str]] = {}  # class -> names of its bases
        self.fields: dict[str, list[str]] = {}  # class -> names of its annotated fields
        self.followed: list[tuple[str, int]] = []  # the variables whose texts are being collected
        self.raises: list[tuple[Path, ast.Raise, Function | None, str]] = []  # with the class around it
        self.handled: dict[
            int, tuple[str, set[str]]
        ] = {}  # id of a raise -> name of the error handled there, its types
        for path, tree in self.files.items():
            self._read(path, tree, None, "")

    def _read(self, path: Path, node: ast.AST, function: Function | None, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner, inner_owner = function, owner
            match child:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.functions.setdefault(child.name, []).append(child)
                    inner = child
                case ast.ClassDef():
                    self.bases[child.name] = {name_of(base) for base in child.bases}
                    annotated = [part for part in child.body if isinstance(part, ast.AnnAssign)]
                    self.fields[child.name] = [name_of(part.target) for part in annotated]
                    inner_owner = child.name
                case ast.Call():
                    self.calls.setdefault(name_of(child.func), []).append((child, function))
                case ast.Assign() | ast.AnnAssign() if function is None and child.value is not None:
                    for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                        self.constants.setdefault(name_of(target), []).append(child.value)
                case ast.Raise():
                    self.raises.append((path, child, function, owner))
                case ast.ExceptHandler(type=ast.expr() as types, name=str() as name):
                    names = {name_of(part) for part in ast.walk(types)}
                    self.handled |= {id(part): (name, names) for part in ast.walk(child) if isinstance(part, ast.Raise)}
            self._read(path, child, inner, inner_owner)

    def subclasses(self, name: str) -> set[str]:
        """Returns the names of a class and of all classes below it."""
        found = {name}
        while more := {child for child, bases in self.bases.items() if bases & found} - found:
            found |= more
        return found

    # ---- What an expression can say

    def texts(self, node: ast.expr | None, function: Function | None, depth: int = DEPTH) -> list[str]:
        """Returns the texts that an expression can be, or those in the list that it is; [] for other values."""
        match node:
            case ast.Constant(value=str() as text):
                return [text]
            case ast.JoinedStr():
                parts = [self._part(part, function, depth) for part in node.values]
                if isinstance(last := node.values[-1], ast.FormattedValue):  # often the cause or the remedy
                    parts[-1] = self.texts(last.value, function, depth) or parts[-1]
                return ["".join(words) for words in product(*parts)]
            case ast.BinOp(op=ast.Add()):
                left, right = self.texts(node.left, function, depth), self.texts(node.right, function, depth)
                is_list = any(isinstance(side, ast.List | ast.ListComp) for side in (node.left, node.right))
                return [*left, *right] if is_list or not left or not right else [a + b for a, b in product(left, right)]
            case ast.IfExp():
                return [*self.texts(node.body, function, depth), *self.texts(node.orelse, function, depth)]
            case ast.BoolOp():
                return [text for value in node.values for text in self.texts(value, function, depth)]
            case ast.List() | ast.Tuple() | ast.Set():
                return [text for part in node.elts for text in self.texts(part, function, depth)]
            case ast.Dict():
                return [text for part in node.values for text in self.texts(part, function, depth)]
            case ast.Starred() | ast.NamedExpr() | ast.DictComp():
                return self.texts(node.value, function, depth)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                return self._of_comprehension(node, function, depth)
            case ast.Call():
                return self._of_call(node, function, depth)
            case ast.Name() if depth:
                return self._of_name(node.id, function, depth - 1)
        return []

    def _part(self, part: ast.expr, function: Function | None, depth: int) -> list[str]:
        """The texts of a part of an f-string: a gathered list of problems is followed, other values are named."""
        if not isinstance(part, ast.FormattedValue):
            return self.texts(part, function, depth)
        value = part.value
        if isinstance(value, ast.Call) and name_of(value.func) == "listing":
            return self.texts(value, function, depth) or [placeholder(value)]
        if isinstance(value, ast.Name) and value.id.isupper():
            return self.texts(value, function, depth) or [placeholder(value)]
        return [placeholder(value)]

    def _of_comprehension(
        self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, function: Function | None, depth: int
    ) -> list[str]:
        if not isinstance(node.elt, ast.Name):
            return self.texts(node.elt, function, depth)
        for generator in node.generators:
            if node.elt.id in {name.id for name in ast.walk(generator.target) if isinstance(name, ast.Name)}:
                return self.texts(generator.iter, function, depth)
        return []

    def _of_call(self, node: ast.Call, function: Function | None, depth: int) -> list[str]:
        name = name_of(node.func)
        if name in ("listing", "list", "sorted", "tuple", "str"):
            return [text for argument in node.args for text in self.texts(argument, function, depth)]
        if name in ("items", "values") and isinstance(node.func, ast.Attribute):
            return self.texts(node.func.value, function, depth)
        if name == "map" and depth:
            return self._returned(name_of(node.args[0]), depth - 1)
        if not depth or name in ("nearest", "nearest_path", "suggestion", "join", "our_name"):
            return []
        return self._returned(name, depth - 1)

    def _returned(self, name: str, depth: int) -> list[str]:
        """The texts that functions of this name return or yield."""
        results = []
        for function in self.functions.get(name, []):
            for node in own_nodes(function):
                if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom):
                    results += self.texts(node.value, function, depth)
        return results

    def _of_name(self, name: str, function: Function | None, depth: int) -> list[str]:
        """The texts of a variable: of what is assigned or appended to it, given for it, or of a constant."""
        key = (name, id(function))
        if key in self.followed:  # x = x + ...
            return []
        self.followed.append(key)
        try:
            return self._of_values(name, function, depth)
        finally:
            self.followed.pop()

    def _of_values(self, name: str, function: Function | None, depth: int) -> list[str]:
        constants = self.constants.get(name, [])
        constant = constants[0] if len(constants) == 1 else None  # which of several is meant is not looked up
        if function is None:
            return self.texts(constant, None, depth)
        values = values_in(function).get(name, [])
        parameters = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if name in parameters:
            index = parameters.index(name) - (parameters[0] in ("self", "cls"))
            given = [
                self.texts(argument, caller, depth)
                for call, caller in self.calls.get(function.name, [])
                for argument in [
                    *call.args[index : index + 1],
                    *(keyword.value for keyword in call.keywords if keyword.arg == name),
                ]
            ]
            return [text for texts in given for text in texts]
        if not values:
            return self.texts(constant, None, depth)
        return [text for value in values for text in self.texts(value, function, depth)]


@cache
def own_nodes(function: Function) -> list[ast.AST]:
    """Returns the nodes of a function, without those of functions inside it."""
    nodes: list[ast.AST] = list(function.body)
    for node in nodes:  # grows meanwhile
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return nodes


@cache
def values_in(function: Function) -> dict[str, list[ast.expr]]:
    """Returns name of a variable -> what a function assigns or adds to it, or takes it from."""
    values: dict[str, list[ast.expr]] = {}

    def add(target: ast.AST, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, part_value in zip(target.elts, value.elts, strict=False):
                add(part, part_value)
        else:
            values.setdefault(name_of(target), []).append(value)

    for node in own_nodes(function):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    add(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                add(target, value)
            case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                add(target, value)
            case ast.Call(func=ast.Attribute(attr="append" | "extend", value=owner), args=[value]):
                add(owner, value)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                for part in ast.walk(target):
                    add(part, value)
    return values


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def placeholder(node: ast.expr) -> str:
    """Returns a name in capitals for a value in a message; '' for what suggests near names, if there are any."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper()
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.GeneratorExp(generators=[generator])]):
            return placeholder(generator.iter)
        case ast.Call(func=ast.Attribute(attr="join"), args=[value]):
            return placeholder(value)
        case ast.Call(func=ast.Name(id="nearest" | "nearest_path" | "suggestion")):
            return ""
        case ast.Call(func=ast.Name(id="len")):
            return "N"
        case ast.Call(func=ast.Name(id="type" | "sorted" | "list" | "str"), args=[value]):
            return placeholder(value)
        case ast.Call(func=ast.Attribute(attr="values" | "keys" | "items" | "replace" | "strip", value=value)):
            return placeholder(value)
        case ast.Call(func=function):
            return placeholder(function)
        case ast.BoolOp(values=[value, *_, last]):
            return placeholder(last if isinstance(last, ast.Constant) else value)
        case ast.Constant(value=str() as text):
            return text
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return placeholder(value)
        case ast.List(elts=[value, *_]) | ast.Tuple(elts=[value, *_]):
            return placeholder(value)
    return "VALUE"


def last_part(node: ast.expr) -> ast.expr:
    match node:
        case ast.JoinedStr(values=[*_, last]) | ast.BinOp(right=last):
            return last
    return node


# ---- Settings


def settings_of(source: Source) -> set[str]:
    """Returns the names of all settings: the fields of the classes that check them."""
    return {name for model in source.subclasses("StrictModel") for name in source.fields[model]} - {"model_config"}


def named_settings(text: str, settings: Iterable[str]) -> tuple[str, ...]:
    """Returns the settings and flags in a message, as it writes them, in its order.

    A name that is also a plain word counts as a flag or with its value: `--data`, `r = 0`, `device NAME`.
    """
    plain = "|".join(sorted(name for name in settings if "_" not in name))
    others = "|".join(sorted(name for name in settings if "_" in name))
    pattern = rf"{FLAG.pattern}|(?<![\w./-])(?:{others})\b(?!\()|(?:^|(?<=[;:] )|(?<=\n))(?:{plain}){VALUE}"
    return tuple(dict.fromkeys(re.findall(pattern, text)))


@cache
def messages() -> list[Message]:
    """Returns every message of an error that names a setting, sorted by the first of them."""
    was_enabled = gc.isenabled()
    gc.disable()  # it would look through all nodes that are there again and again, which takes longer than reading
    try:
        source = Source(ROOT / "tailora")
    finally:
        if was_enabled:
            gc.enable()
    settings = settings_of(source)
    checks = source.subclasses("StrictModel")  # their ValueErrors become ConfigErrors
    kinds = source.subclasses("TailoraError")
    found: dict[str, Message] = {}
    for path, node, function, owner in source.raises:
        if not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        kind = name_of(node.exc.func)
        if kind == "ValueError" and owner in checks:
            kind = "ConfigError"
        if kind not in kinds:
            continue
        name, types = source.handled.get(id(node), ("", set()))
        last = {part.id for part in ast.walk(last_part(node.exc.args[0])) if isinstance(part, ast.Name)}
        passes_on = bool(types & kinds) and name in last  # what it says is the message of another error
        for text in source.texts(node.exc.args[0], function):
            file = path.relative_to(ROOT).as_posix()
            message = Message(text, kind, file, node.lineno, named_settings(text, settings))
            if message.settings and (message.remedy or not passes_on):
                found.setdefault(text, message)
    return sorted(found.values(), key=lambda message: (key_of(message.settings[0]), message.text))


def key_of(setting: str) -> str:
    """Returns the name of a setting without the dashes of its flag."""
    return setting.lstrip("-").replace("-", "_")


# ---- The page


def catalogue() -> str:
    """Returns the part of the page of errors that lists the messages by setting."""
    sections = []
    for key, group in groupby(messages(), key=lambda message: key_of(message.settings[0])):
        rows = [f"| {escaped(each.cause)} | {escaped(each.remedy)} | `{each.error}` |" for each in group]
        sections.append(f"### `{key}`\n\n| message | what to do | error |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(sections)


def accepted_values(model: type[BaseModel]) -> str:
    """Returns a table of the values that each setting takes; others are refused with `SETTING = VALUE: ...`."""
    rows = []
    for name, schema in model.model_json_schema()["properties"].items():
        kinds = [accepted(kind) for kind in schema.get("anyOf", [schema])]
        default = schema.get("default")
        shown = (
            "" if default in (None, [], {}) else f"`{str(default).lower() if default in (True, False) else default}`"
        )
        rows.append(f"| `{name}` | {' or '.join(kind for kind in kinds if kind)} | {shown} |")
    return "| setting | takes | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def accepted(schema: dict[str, Any]) -> str:
    """Returns in words which values a JSON schema allows; '' for null, which stands for the default."""
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    words = {
        "boolean": "`true` or `false`",
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "array": "a list",
        "object": "`NAME=VALUE` pairs",
    }
    limits = [
        f"{sign} {schema[key]:,}"
        for key, sign in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "up to"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    return " ".join([words.get(schema.get("type", ""), ""), *limits]).strip()


def escaped(text: str) -> str:
    """Returns text for a cell of a table in Markdown; flags become code, and what is in backticks stays it."""
    parts = re.split(r"(`[^`]*`)", re.sub(rf"(`[^`]*`)|({FLAG.pattern})", r"\1`\2`", text).replace("``", ""))
    cells = [part if part.startswith("`") else re.sub(r"([\\`*_\[\]<>#])", r"\\\1", part) for part in parts]
    return "".join(cells).replace("|", "\\|").replace("\n", "<br>")
