"""docs/from_scratch.md: its 60 lines run and print what the page shows, and what it says of both versions is so."""

import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.site import from_scratch
from benchmarks.site.page_blocks import blocks

pytestmark = pytest.mark.pages

BLOCKS = blocks(from_scratch.PAGE)
NUMBER = re.compile(r"\d+\.\d+")  # trained: other processors give other last digits
Run = tuple[dict[str, str], dict[str, Any]]  # what the blocks print, and the names that they define


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        yield from_scratch.run_page()


def test_the_page_shows_what_its_code_prints(run: Run) -> None:
    shown = {block.part: block.text.strip() for block in BLOCKS if block.part}
    assert shown.keys() == run[0].keys()
    for part, printed in run[0].items():
        assert NUMBER.sub("N", printed) == NUMBER.sub("N", shown[part]), f"run benchmarks/site/from_scratch.py: {part}"
        here, there = (list(map(float, NUMBER.findall(text))) for text in (printed, shown[part]))
        assert here == pytest.approx(there, rel=0.05, abs=0.002), part


def test_the_numbered_blocks_have_60_lines() -> None:
    numbered = [block.text.splitlines() for block in BLOCKS if re.match(r"# \d\. ", block.text)]
    assert [first[2] for first, *_ in numbered] == list("12345")
    assert sum(bool(line.strip()) for _, *lines in numbered for line in lines) == 60


def test_both_versions_train_alike_and_the_base_stays(run: Run) -> None:
    names = run[1]
    small, model, base, tokens = (names[name] for name in ("small", "model", "base", "tokens"))
    assert names["small_losses"][-1] < names["small_losses"][0] / 100
    assert names["small_losses"] == pytest.approx(names["losses"], rel=1e-3)
    expected = base(tokens)
    with model.disable_adapter():
        assert torch.equal(model(tokens), expected)
    for name in ("back", "twos"):
        small.set_adapter(name)
        model.set_adapter(name)
        assert not torch.allclose(small(tokens), expected, atol=1)
        for path, layer in model.adapter(name).low_rank.items():
            update = small.layers[path].adapters[name]
            layer.lora_A.data, layer.lora_B.data, layer.scaling = update.A.data, update.B.data, update.s.detach()
        torch.testing.assert_close(model(tokens), small(tokens), rtol=1e-3, atol=1e-3)


def test_an_optimizer_of_the_short_version_gets_inactive_adapters_too(run: Run) -> None:
    small, model = run[1]["small"], run[1]["model"]
    updates = [update for layer in small.layers.values() for update in layer.adapters.values()]
    factors = {id(factor) for update in updates for factor in (update.A, update.B)}
    assert factors <= {id(parameter) for parameter in small.parameters() if parameter.requires_grad}
    model.set_adapter("back")
    parts = {id(parameter) for layer in model.adapter("back").parts.values() for parameter in layer.parameters()}
    assert {id(parameter) for parameter in model.lora_layers.parameters()} == parts


def test_the_names_of_tailora_exist() -> None:
    names = re.findall(r"`(tailora\.[\w.]+)`", from_scratch.PAGE.read_text())
    assert len(names) == 10
    for name in names:
        pkgutil.resolve_name(name)
