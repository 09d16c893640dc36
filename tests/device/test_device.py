"""What the files that know devices say about one that is neither CUDA nor MPS."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from pretend_accelerator import counted, memory_limit, no_float64
from tiny import chat_model, chat_tokenizer
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tailora import LoRAConfig, LoRAModel
from tailora.core.data_init import INPUT_PASSES
from tailora.core.device import choose_device, device_name, devices, has_bfloat16, synchronize, wide_dtype
from tailora.evaluation.forgetting import sample_texts
from tailora.train.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from tailora.train.model_loading import load_base
from tailora.train.parallel import Sharding
from tailora.train.setup import start_on_device
from tailora.train.state import random_state, seeded, set_random_state

pytestmark = pytest.mark.device


def test_an_accelerator_that_torch_knows_is_chosen(device: torch.device) -> None:
    assert choose_device() == choose_device("auto") == choose_device("pretend") == choose_device("pretend:0") == device
    assert devices() == [device, torch.device("cpu")]
    assert device_name(device) == "pretend accelerator"
    assert has_bfloat16(device)
    assert wide_dtype(device) == torch.float64
    with no_float64():
        assert wide_dtype(device) == torch.float32
    with counted() as counts:
        synchronize(device)
    assert counts.synchronisations == {"device": 1}


def test_accelerate_follows_the_device_of_each_run(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    try:
        for name, expected in (("cpu", "cpu"), ("auto", "pretend:0"), ("cpu", "cpu"), ("pretend", "pretend:0")):
            assert str(start_on_device(name)) == str(PartialState().device) == expected
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        assert str(start_on_device("auto")) == "cpu"
        assert str(start_on_device("pretend")) == "pretend:0"
    finally:
        PartialState().device = device


def test_random_numbers_of_the_device_are_saved_and_restored(device: torch.device) -> None:
    states = random_state()
    assert states["pretend.0"].device.type == "cpu"
    first = torch.rand(3, device=device)
    with seeded(5):
        torch.rand(3, device=device)
    set_random_state(states)
    assert torch.equal(torch.rand(3, device=device), first)
    del states["pretend.0"]  # a checkpoint of a machine without it
    set_random_state(states)


def test_what_draws_random_numbers_for_itself_leaves_the_devices_state(device: torch.device) -> None:
    model = LoRAModel(chat_model().to(device), LoRAConfig(r=2))
    state = random_state()["pretend.0"]
    sample_texts(model, chat_tokenizer(["red"]), count=2, length=3)
    assert torch.equal(random_state()["pretend.0"], state)


def test_memory_is_that_of_the_device(device: torch.device) -> None:
    reset_peak(device)
    before = used_bytes(device)
    a = torch.zeros(1_000_000, device=device)
    assert used_bytes(device) == before + 4_000_000
    with memory_limit(before + 5_000_000):
        assert available_bytes(device) == 1_000_000
    del a
    assert used_bytes(device) == before
    assert peak_bytes(device) == before + 4_000_000
    reset_peak(device)
    assert peak_bytes(device) == before


def waits_of_start(device: torch.device, layers: int, batches: int) -> int:
    """How often the host waits for the device while an adapter starts from data."""
    config = LoRAConfig(r=2, init_lora_weights="eva", target_modules=["q_proj", "up_proj"])
    model = LoRAModel(chat_model(num_hidden_layers=layers).to(device), config)
    data = [{"input_ids": (ids := torch.arange(12, device=device).view(2, 6)), "labels": ids, "use_cache": False}]
    with counted() as counts:
        model.start_from_data(data * batches)
    return sum(counts.synchronisations.values())


def test_a_start_from_data_waits_for_the_device_rarely(device: torch.device) -> None:
    waits = {(layers, batches): waits_of_start(device, layers, batches) for layers in (1, 3) for batches in (1, 5)}
    for layers in (1, 3):
        assert waits[layers, 5] - waits[layers, 1] <= INPUT_PASSES * 4  # one in each forward, by transformers
    assert waits[3, 1] - waits[1, 1] <= 6 * 4  # once for each adapted layer: its random directions, its svd


def largest_growth(action: Callable[[], object], size: Callable[[], int]) -> int:
    """Returns by how much `size` grows at most while the action runs."""
    start = size()
    sizes, stop = [start], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            sizes.append(size())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        action()
    finally:
        stop.set()
        thread.join()
    return max(sizes) - start


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory is of no file")


def host_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def large_model(folder: Path, largest_file: str, **sizes: int) -> int:
    """Writes a model in float32 to the folder, and returns the number of its weights."""
    model = chat_model(vocab_size=320, hidden_size=512, intermediate_size=2048, **sizes)
    model.save_pretrained(folder, max_shard_size=largest_file)
    chat_tokenizer(["red green"]).save_pretrained(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 10) == (largest_file == "5MB")
    return sum(parameter.numel() for parameter in model.parameters())


@linux
@pytest.mark.parametrize("largest_file", ["5MB", "1GB"])
def test_the_host_never_holds_the_model(device: torch.device, tmp_path: Path, largest_file: str) -> None:
    weights = large_model(tmp_path, largest_file, num_hidden_layers=5)

    def host() -> int:
        return host_bytes() - used_bytes(device)  # the device's is the host's

    loaded = []
    growth = largest_growth(lambda: loaded.append(load_base(str(tmp_path), "bfloat16", device)[0]), host)
    assert {tensor.device for tensor in loaded[0].state_dict().values()} == {device}
    assert weights * 2 > 30_000_000
    assert growth < 10_000_000  # of tensors of at most 4 MB, four are converted at a time


@linux
def test_a_model_in_many_files_is_quantised_tensor_by_tensor(tmp_path: Path) -> None:
    """On the CPU, where bitsandbytes has kernels; its memory is the host's, so it may grow by the quantised model."""
    weights = large_model(tmp_path, "5MB", num_hidden_layers=10)
    load_base(str(tmp_path), "bfloat16", "cpu", "nf4")  # what the packages need for themselves
    loaded = []
    growth = largest_growth(lambda: loaded.append(load_base(str(tmp_path), "bfloat16", "cpu", "nf4")[0]), host_bytes)
    size = sum(parameter.nbytes for parameter in loaded[0].parameters())
    assert size < weights * 0.6
    assert growth < size + 25_000_000 < weights * 1.5  # of float32 in 4 MB, bfloat16 in 2 and their blocks; not of all


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one, whose collectives copy."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_sharded_weights_change_nothing(settings: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    chat_model().save_pretrained(tmp_path)
    chat_tokenizer(["one"]).save_pretrained(tmp_path)
    ids = torch.arange(12, device=device)[None]
    results = []
    for sharding in (None, Sharding(device)):
        base, _ = load_base(str(tmp_path), "float32", device, sharding=sharding)
        with seeded(0), torch.no_grad():
            model = LoRAModel(base, LoRAConfig(r=4, **settings))
            for layer in model.lora_layers.values():
                layer.lora_B.add_(0.01)
        (loss := model(input_ids=ids, labels=ids).loss).backward()
        results.append([loss, *(parameter.grad for parameter in model.lora_layers.parameters())])
    for sharded, expected in zip(*reversed(results), strict=True):
        assert sharded.device == device
        assert torch.equal(sharded, expected)
    assert sum(isinstance(parameter, DTensor) for parameter in base.parameters()) > 10
    assert all(buffer.device == device for buffer in base.buffers())
