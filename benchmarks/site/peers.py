"""The settings of other tools that tailora has too, with the defaults of both, read from the tools' own source.

    pip download --no-deps --dest wheels unsloth axolotl llamafactory mlx-lm
    python -m benchmarks.site.peers --wheels wheels      writes benchmarks/results/peers.json

PEFT, TRL and transformers are read as they are installed here. Which of their names is which of ours, and which means
the same, is in `tailora.core.config`. `update_docs.py` makes the tables of docs/coming_from of the result.
"""

import argparse
import ast
import dataclasses
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import measure
from tailora.core.config import ALIASES, OUR_NAMES
from tailora.train.config import TrainConfig

Defaults = dict[str, Any]  # name of a setting -> its default
NOT_OURS = {  # tool -> names that mean something else there than where we know them from, or are not for users
    "PEFT": (),
    "TRL": ("data_seed", "eval_packing"),
    "Unsloth": ("model",),
    "Axolotl": ("adapter", "quantization", "max_memory", "device", "batch_size", "bfloat16", "float32"),
    "LLaMA-Factory": ("data_seed",),
    "mlx-lm": ("adapter_path",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels")
    wheels = {path.name.split("-")[0]: path for path in parser.parse_args().wheels.glob("*.whl")}
    tools = {"PEFT": installed_peft(), "TRL": installed_trl()}
    for title, (package, read) in READERS.items():
        files = sources(wheels[package])
        tools[title] = {"version": wheels[package].name.split("-")[1], "settings": read(files)}
    for title, tool in tools.items():
        tool["names"] = sorted(tool["settings"])
        tool["settings"] = shared(title, tool["settings"])
    defaults = {name: shown(field.default) for name, field in TrainConfig.model_fields.items()}
    print(measure.write("peers", {"tailora": defaults, "tools": tools}))


def shared(title: str, settings: Defaults) -> dict[str, dict[str, str]]:
    """Returns name there -> its default there, and its name here, of all that tailora has, too."""
    return {
        name: {"default": shown(value), "ours": ours(name)}
        for name, value in settings.items()
        if ours(name) and name not in NOT_OURS[title]
    }


def ours(name: str) -> str:
    """Returns our name of their setting, with a value if theirs is a switch; '' if there is none."""
    return name if name in TrainConfig.model_fields else OUR_NAMES.get(name, ALIASES.get(name, ""))


def shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


# ---- Installed packages


def fields_of(config: Any) -> Defaults:
    """Returns the defaults of a dataclass; of a field that makes its default, what it makes."""
    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(config)
        if field.init
    }


def installed_peft() -> dict[str, Any]:
    from peft import LoraConfig

    return {"version": version("peft"), "settings": fields_of(LoraConfig)}


def installed_trl() -> dict[str, Any]:
    from trl import SFTConfig

    return {"version": version("trl"), "settings": fields_of(SFTConfig)}


# ---- Wheels


def sources(wheel: Path) -> dict[str, ast.Module]:
    """Returns path in the wheel -> its parsed source."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(FILES)]
        return {name: ast.parse(archive.read(name)) for name in names}


NO_SETTING = object()
FILES = (
    *("unsloth/models/llama.py", "unsloth/models/loader.py", "mlx_lm/lora.py"),
    *(f"llamafactory/hparams/{name}_args.py" for name in ("finetuning", "data", "model")),
    *(f"axolotl/utils/schemas/{name}.py" for name in ("config", "peft", "training", "model", "model_base")),
)


def parameters(function: ast.FunctionDef) -> Defaults:
    """Returns the defaults of the parameters of a function; of those without one, that it is required."""
    arguments, defaults = function.args.args, function.args.defaults
    values = [*[None] * (len(arguments) - len(defaults)), *defaults]
    return {
        argument.arg: "required" if value is None else literal(value)
        for argument, value in zip(arguments, values, strict=True)
    }


def annotated_fields(files: dict[str, ast.Module], name: str) -> Defaults:
    """Returns the defaults of the annotated fields of a class and its bases, in these files."""
    classes = {node.name: node for tree in files.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found: Defaults = {}
    waiting = [name]
    for known in waiting:  # grows meanwhile
        if known in classes:
            waiting += [base.id for base in classes[known].bases if isinstance(base, ast.Name)]
            for part in classes[known].body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    found.setdefault(part.target.id, default_of(part.value))
    return {name: value for name, value in found.items() if value is not NO_SETTING}


def default_of(value: ast.expr | None) -> Any:
    if value is None:
        return "required"
    if not isinstance(value, ast.Call):
        return literal(value)
    if any(keyword.arg == "init" for keyword in value.keywords):
        return NO_SETTING
    given = [keyword.value for keyword in value.keywords if keyword.arg == "default"] or value.args[:1]
    return literal(given[0]) if given else "required"


def literal(node: ast.expr) -> Any:
    """Returns the value of a literal, and the code of what is none."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def functions(tree: ast.Module, class_name: str, name: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            yield from (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == name)


def unsloth(files: dict[str, ast.Module]) -> Defaults:
    """The parameters of FastLanguageModel.from_pretrained and .get_peft_model."""
    (load,) = functions(files["unsloth/models/loader.py"], "FastLanguageModel", "from_pretrained")
    (adapt,) = functions(files["unsloth/models/llama.py"], "FastLlamaModel", "get_peft_model")
    return parameters(load) | parameters(adapt)


def axolotl(files: dict[str, ast.Module]) -> Defaults:
    return annotated_fields(files, "AxolotlInputConfig")


def llamafactory(files: dict[str, ast.Module]) -> Defaults:
    """Its own settings, and those of transformers' TrainingArguments, which its files of settings set too."""
    from transformers import TrainingArguments

    own = [annotated_fields(files, f"{name}Arguments") for name in ("Finetuning", "Data", "Model")]
    return fields_of(TrainingArguments) | own[0] | own[1] | own[2]


def mlx_lm(files: dict[str, ast.Module]) -> Defaults:
    """CONFIG_DEFAULTS, with what is in lora_parameters."""
    (defaults,) = (
        literal(node.value)
        for node in files["mlx_lm/lora.py"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG_DEFAULTS"
    )
    return {**defaults, **defaults["lora_parameters"]}


READERS = {  # tool -> its package, and what reads its settings
    "Unsloth": ("unsloth", unsloth),
    "Axolotl": ("axolotl", axolotl),
    "LLaMA-Factory": ("llamafactory", llamafactory),
    "mlx-lm": ("mlx_lm", mlx_lm),
}

if __name__ == "__main__":
    main()
