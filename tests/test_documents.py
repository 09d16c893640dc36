"""README.md and docs/: their figures are those of benchmarks/results, and what they name exists.

test_pages.py runs their code.
"""

import re
import shlex
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command_parser
from tiny import chat_model
from torch.distributed.run import get_args_parser

from benchmarks.measure import spread
from benchmarks.site.page_blocks import blocks, inline, measured_parts
from benchmarks.update_docs import PARTS, read
from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import COMMANDS, app
from tailora.formats.export import FORMATS
from tailora.formats.serving_targets import TARGETS, Serving, script, with_commands
from tailora.train.quantize import METHODS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def code_blocks(name: str, language: str) -> list[str]:
    return [block.text for block in blocks(ROOT / "docs" / f"{name}.md") if block.language == language]


def test_the_messages_about_images_exist() -> None:
    table = page("images").partition("## What is refused")[2]
    code = re.sub(r'"\s+f?"', "", " ".join(path.read_text() for path in (ROOT / "tailora" / "data").glob("*.py")))
    messages = re.findall("^\\| `(.*?)`", table, re.MULTILINE)
    assert len(messages) > 5
    for message in messages:
        parts = re.split(r"[\d,]*\d(?: x \d+)?|<image>|FOLDER", message)  # at what differs from row to row
        assert re.search(r"{[^{}]*}".join(map(re.escape, parts)), code), message


def test_the_exports_of_the_page_are_all_formats() -> None:
    exported = set(re.findall(r"^tailora export .* --to (\S+)", page("export"), re.MULTILINE))
    assert exported == FORMATS.keys() - {"diffusers"} | {"vllm", "llama-server"}


def test_the_servers_of_the_page_are_those_of_the_table() -> None:
    (table,) = re.findall(r"(\| `--to` .*?)\n\n", page("export"), re.DOTALL)
    servers = {row.split("|")[1].strip(" `"): row for row in table.splitlines()[2:]}
    assert servers.keys() == TARGETS.keys()
    assert all(f"| `{TARGETS[name].format}` |" in row for name, row in servers.items())
    (text,) = code_blocks("export", "text")
    base, stops = "HuggingFaceTB/SmolLM2-135M-Instruct", {2: "<|im_end|>"}
    serving = Serving("vllm", "portable", "demo-vllm", base, 16, 8192, stops, {}, None, None)
    assert text == script(with_commands(serving, "."))


def test_each_row_of_the_serving_table_has_its_own_number_of_rounds() -> None:
    results = read("serve")
    rounds = {name: arm["tokens_per_second"]["n"] for name, arm in results["arms"].items()}
    rounds |= {name: ratio["n"] for name, ratio in results["ratios"].items()}
    assert set(rounds.values()) == {2, 5}
    for name, count in rounds.items():
        assert f"\n| {name} | {count} | " in page("serving")
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}


def test_measured_parts_are_what_the_results_give() -> None:
    documents = {document.relative_to(ROOT).as_posix(): document for document in DOCUMENTS}
    assert documents.keys() >= PARTS.keys()
    for file, document in documents.items():
        marked = measured_parts(document)
        assert sorted(name for name, _ in marked) == sorted(PARTS.get(file, {})), file
        for name, content in marked:
            assert content == PARTS[file][name]().strip(), f"run benchmarks/update_docs.py: {name} of {file} is old"


def test_every_setting_and_every_quantization_method_has_its_description() -> None:
    for name in (*LoRAConfig.model_fields, *METHODS):
        assert re.search(rf"`(--quantize )?{name}\b", page("lora")), name


def test_the_lines_for_adapters_in_memory_run() -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=4, use_rslora=True, learn_scaling=True), "a")
    model.add_adapter("legal", LoRAConfig(r=4, use_dora=True))
    model.add_adapter("chat", LoRAConfig(r=4, init_lora_weights="pissa"))
    (table,) = re.findall(r"## Several adapters in memory\n(.*?)\n\n", page("adapters"), re.DOTALL)
    ids = torch.arange(12).view(3, 4)
    for line in (code for row in table.splitlines()[2:] for code in re.findall("`(.*?)`", row.split("|")[2])):
        code = line.replace("model.generate(...)", "model(ids)").replace("r=32", "r=8")
        exec(f"{code} pass" if code.endswith(":") else code, {"model": model, "ids": ids})
        if '"plain"' in line:
            model.delete_adapter("plain")
    assert not model.is_merged


def test_the_lines_that_start_several_processes_are_those_of_their_launchers() -> None:
    text = "".join(code_blocks("distributed", "bash")).replace("\\\n", "")
    lines = [line for line in text.splitlines() if " train " in line]
    starts = []
    for words in map(shlex.split, lines):
        ours = words[words.index("train") :]
        assert not app(ours).parse_known_args(ours)[2], ours
        if words[0] == "accelerate":
            parsed = launch_command_parser().parse_args(words[2:])
        elif words[0] != "tailora":
            parsed = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        starts.append(words[0])
        assert words[0] == "tailora" or (parsed.module, parsed.training_script) == (True, "tailora")
    assert starts == ["tailora", "tailora", "torchrun", "accelerate", "torchrun", "srun", "accelerate", "tailora"]


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `tailora (\w+)", page("commands"), re.MULTILINE)) == set(COMMANDS)


def test_messages_name_pages_by_their_titles_on_the_site() -> None:
    """Who has installed the package has no folder docs/."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    source = "\n".join(path.read_text() for path in (ROOT / "tailora").rglob("*.py"))
    titles = set(re.findall(r'"([^"\n]+)" in the docs', source))
    assert len(titles) > 3
    assert not titles - set(re.findall(r"- (.+): \S+\.md$", navigation, re.MULTILINE))
    assert not re.findall(r"(?<!/)docs/\w+\.md", source)


def test_links_and_files_named_in_documents_exist() -> None:
    missing, folders = list[str](), (ROOT, ROOT / "tailora", ROOT / "benchmarks")
    for document in DOCUMENTS:
        targets = [str(token.attrGet("href") or token.attrGet("src") or "") for token in inline(document)]
        links = [target.partition("#")[0] for target in targets if "://" not in target]
        missing += [f"{document.name}: {link}" for link in links if link and not (document.parent / link).exists()]
        named = re.findall(r"`([\w/]+\.py)", document.read_text())
        missing += [f"{document.name}: {name}" for name in named if not any((at / name).exists() for at in folders)]
    assert missing == []
