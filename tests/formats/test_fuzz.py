"""Adapter folders that are damaged at random: each loads as the same adapter, or is refused with a TailoraError."""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import limited
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import TailoraError
from tailora.formats.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:.*ignoring unknown settings")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS | st.sampled_from([10**400, "((a+)+)+$", "0", "all-linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
SHAPES = st.lists(st.integers(-1, 2**64), max_size=3) | st.sampled_from([[4, 12], [2**40, 2**40], [0]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()))  # type: ignore[no-any-return]


X = torch.randn(5, 12, generator=torch.Generator(torch.get_default_device()).manual_seed(0))


@pytest.fixture(scope="module")
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def good(base: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoRAConfig(r=4, use_rslora=True, target_modules=["first", "second"], modules_to_save=["head"])
    model = LoRAModel(copy.deepcopy(base), config)
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.save_adapter(tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture(scope="module")
def load(base: Net, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], Tensor]:
    """Returns a function that loads a copy of the folder with other bytes in one file, and returns the outputs."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(good, folder)

    def load(name: str, content: bytes) -> Tensor:
        original = (good / name).read_bytes()
        (folder / name).write_bytes(content)
        try:
            with limited(), torch.no_grad():
                return LoRAModel.from_pretrained(copy.deepcopy(base), folder).eval()(X)  # type: ignore[no-any-return]
        finally:
            (folder / name).write_bytes(original)

    return load


@st.composite
def changed(draw: st.DrawFn, settings: dict[str, Any], values: st.SearchStrategy[Any] = VALUES) -> dict[str, Any]:
    """The settings with one to three of them replaced, removed or added."""
    settings = copy.deepcopy(settings)
    for name in draw(st.lists(st.sampled_from(list(settings)) | st.text(max_size=8), min_size=1, max_size=3)):
        if draw(st.booleans()):
            settings[name] = draw(values)
        else:
            settings.pop(name, None)
    return settings


@pytest.mark.slow
@given(data=st.data())
def test_other_settings_load_the_same_adapter_or_are_refused(
    data: st.DataObject, good: Path, load: Callable[[str, bytes], Tensor]
) -> None:
    original = (good / ADAPTER_CONFIG).read_bytes()
    expected = load(ADAPTER_CONFIG, original)
    every_setting = dict.fromkeys(peft.LoraConfig.__dataclass_fields__) | json.loads(original)
    content = data.draw(changed(every_setting).map(lambda settings: json.dumps(settings).encode()) | st.binary())
    with suppress(TailoraError):
        torch.testing.assert_close(load(ADAPTER_CONFIG, content), expected)


@given(data=st.data())
def test_another_header_is_loaded_or_refused(
    data: st.DataObject, good: Path, load: Callable[[str, bytes], Tensor]
) -> None:
    """A header may name other tensors of the right shapes, which cannot be noticed."""
    original = (good / ADAPTER_WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    metadata = json.loads(header["__metadata__"]["tailora"])
    of_tailora = changed(metadata).map(json.dumps)
    offsets = st.lists(st.integers(0, len(original)), min_size=2, max_size=2)
    entry = changed(header[next(name for name in header if name != "__metadata__")], SHAPES | offsets | VALUES)
    of_file = of_tailora.map(lambda text: {**header, "__metadata__": {"format": "pt", "tailora": text}})
    text = json.dumps(data.draw(of_file | changed(header, entry | VALUES))).encode()
    with suppress(TailoraError):
        assert load(ADAPTER_WEIGHTS, len(text).to_bytes(8, "little") + text + original[end:]).shape == (5, 3)


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_bytes_are_loaded_or_refused(
    position: float, byte: int, cut: bool, good: Path, load: Callable[[str, bytes], Tensor]
) -> None:
    """Weights have no checksum: other finite values are loaded."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        content = bytearray((good / name).read_bytes())
        place = int(position * len(content))
        content = content[:place] if cut else content
        if not cut:
            content[place] = byte
        with suppress(TailoraError):
            assert load(name, bytes(content)).shape == (5, 3)
