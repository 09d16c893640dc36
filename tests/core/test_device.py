from pathlib import Path

import pytest
import torch

from tailora.core.device import choose_device, device_name, devices, fast_dtype, has_bfloat16, synchronize, wide_dtype
from tailora.errors import ConfigError
from tailora.train.run_log import environment
from tailora.train.state import random_state

CPU = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA cards, of which the second is torch's current one, and Apple's GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.mps)):
        monkeypatch.setattr(module, "device_count", lambda count={"cuda": 2, "xpu": 0, "mps": 1}[kind]: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    for module in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(module, "device_count", lambda: 0)


@pytest.mark.usefixtures("cards")
def test_auto_is_the_first_accelerator_and_a_kind_alone_is_its_current_device() -> None:
    assert [str(device) for device in devices()] == ["cuda:0", "cuda:1", "mps:0", "cpu"]
    chosen = {name: str(choose_device(name)) for name in ("cuda", "cuda:0", "cuda:1", "mps", "mps:0", "cpu", "cpu:0")}
    assert chosen == {
        "cuda": "cuda:1",
        "cuda:0": "cuda:0",
        "cuda:1": "cuda:1",
        "mps": "mps:0",
        "mps:0": "mps:0",
        "cpu": "cpu",
        "cpu:0": "cpu",
    }
    assert str(choose_device()) == str(choose_device("auto")) == "cuda:1"


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_card_that_torch_cannot_start_is_named_with_the_cause(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "current_device", fail)
    with pytest.raises(ConfigError, match=r"cannot use device cuda(:0)?: The NVIDIA driver.*\nUse --device cpu"):
        choose_device(name)


@pytest.mark.usefixtures("no_cards")
def test_the_cpu_does_without_a_card_that_torch_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the driver tells it; this torch cannot use it
    assert choose_device("cpu") == CPU
    assert "cuda.0" not in random_state()
    assert environment()["machine"]["gpus"] == []


@pytest.mark.usefixtures("no_cards")
def test_without_an_accelerator_auto_is_the_cpu() -> None:
    assert choose_device() == choose_device("auto") == CPU


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("name", ["cuda:2", "cuda:128", "xpu", "npu", "meta", "xla", "privateuseone", "", "GPU 0"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"no device '{name}' on this machine.* finds cuda:0, cuda:1, mps:0, cpu. Use one of these, or auto$",
    ):
        choose_device(name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu sse2 amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: Some CPU with bf16 in its name", False),
    ],
)
def test_bfloat16_is_read_off_the_processors_flags(tmp_path: Path, line: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bfloat16(CPU, tmp_path / "cpuinfo") == expected
    assert not has_bfloat16(CPU, tmp_path / "missing")


@pytest.mark.parametrize("error", [TypeError, RuntimeError, None])
def test_apples_gpu_is_asked_for_bfloat16_and_never_for_float64(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ones(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append((dtype, device.type))
        if error:
            raise error("BFloat16 is not supported on MPS")
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones)
    assert has_bfloat16("mps") == (error is None)
    assert fast_dtype(torch.device("mps")) == (torch.float32 if error else torch.bfloat16)
    assert wide_dtype(torch.device("mps")) == torch.float32
    assert asked == [(torch.bfloat16, "mps")] * 2


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("hardware", [True, False])
def test_a_card_is_asked_about_itself_and_emulation_does_not_count(
    hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            asked.append(str(self.device))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or hardware)
    assert has_bfloat16(torch.device("cuda:1")) == hardware
    assert asked == ["cuda:1"]
    assert fast_dtype(torch.device("cuda:1")) == (torch.bfloat16 if hardware else torch.float16)


def test_the_cpu_has_a_name_float64_and_nothing_to_wait_for() -> None:
    assert device_name(CPU)
    assert wide_dtype(CPU) == torch.float64
    synchronize(CPU)
