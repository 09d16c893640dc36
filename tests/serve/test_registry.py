"""The adapters that a server knows: names, paths, contents, scales, memory, and many threads at once."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from permissions import modes_obeyed
from safetensors.torch import load_file, save_file
from tiny import chat_model
from tiny_adapters import adapted, token_ids
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.adapter_set import AdapterSet
from tailora.errors import (
    AdapterError,
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
    FormatError,
    MemoryInUseError,
    MemoryLimitError,
    RowsError,
    TailoraError,
)
from tailora.serve import registry as registry_module
from tailora.serve.registry import MOST_SCALED, AdapterRegistry

Make = Callable[..., AdapterRegistry]  # names of ADAPTERS to load -> a registry
ADAPTERS: dict[str, dict[str, Any]] = {
    "legal": {"r": 2},
    "chat": {"r": 3, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.5},
    "dora": {"r": 2, "use_dora": True},
    "rows": {"r": 2, "trainable_token_indices": [3, 5]},
    "head": {"r": 2, "modules_to_save": ["lm_head"]},
}


class Pauses:
    """Counts the pauses of an engine, and knows whether one is on."""

    def __init__(self) -> None:
        self.count, self.is_on = 0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        assert not self.is_on
        self.count, self.is_on = self.count + 1, True
        yield
        self.is_on = False


def save(folder: Path, seed: int = 0, **settings: Any) -> Path:
    model = adapted(settings)
    for parameter in model.lora_layers.parameters():
        parameter.data *= 1 + seed / 10
    model.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name, settings in ADAPTERS.items():
        save(root / name, **settings)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapters"))


@pytest.fixture
def make(root: Path) -> Make:
    def registry(*names: str, budget: float | None = None, **options: Any) -> AdapterRegistry:
        """budget: how often the adapter "legal" fits into memory."""
        adapter_set = AdapterSet(chat_model().eval(), {})
        size = None if budget is None else int(budget * size_in_memory(root / "legal"))
        made = AdapterRegistry(adapter_set, Pauses(), "base", **{"root": root, "memory_budget": size, **options})
        for name in names:
            made.load(name, name)
        return made

    return registry


def size_in_memory(folder: Path) -> int:
    parts = LoRAModel.from_pretrained(chat_model(), folder).lora_layers
    return sum(tensor.nbytes for tensor in (*parts.parameters(), *parts.buffers()))


@torch.no_grad()
def logits(registry: AdapterRegistry, key: str | None) -> Tensor:
    adapter_set = registry._adapter_set
    with adapter_set.activated_by_row([key, None]):
        result: Tensor = adapter_set.base_model(input_ids=token_ids()).logits
    return result[0]


def answer(registry: AdapterRegistry, model: str, scale: float | None = None) -> Tensor:
    with registry.acquire(model, scale) as handle:
        return logits(registry, handle.key)


@torch.no_grad()
def expected(folder: Path, scale: float = 1) -> Tensor:
    model = LoRAModel.from_pretrained(chat_model(), folder)
    model.set_scale("default", scale)
    result: Tensor = model.eval()(input_ids=token_ids()).logits
    return result[0]


def requests(registry: AdapterRegistry) -> int:
    """How many handles are not released; a scaled adapter is also a user of its source."""
    return sum(resident.users - (resident.source is not None) for resident in registry._residents.values())


def keys(registry: AdapterRegistry) -> list[str]:
    return [*registry._adapter_set.adapters]


# ---- Loading


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_as_in_a_lora_model(make: Make, root: Path, name: str) -> None:
    registry = make(name)
    registry._adapter_set.base_model.eval()
    torch.testing.assert_close(answer(registry, name), expected(root / name))
    torch.testing.assert_close(answer(registry, "base"), chat_model()(input_ids=token_ids()).logits[0])
    assert registry.in_memory() == {name}
    [resident] = registry._residents.values()
    assert (resident.users, resident.size) == (0, size_in_memory(root / name))


def test_files_are_read_while_the_engine_computes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make()
    pauses: Any = registry._paused

    def read(*args: Any, **options: Any) -> Any:
        assert not pauses.is_on
        return restore(*args, **options)

    restore = registry_module.restore
    monkeypatch.setattr(registry_module, "restore", read)
    registry.load("legal", "legal")
    assert pauses.count == 1


def spoil_values(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file)


def leave_gguf(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter.gguf")


def save_for_another_base(folder: Path) -> None:
    base = chat_model()
    for parameter in base.parameters():
        parameter.data += 1
    shutil.rmtree(folder)
    adapted({"r": 2}, base).save_adapter(folder)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_values, FormatError, "not finite"),
        (leave_gguf, FormatError, "only contains a GGUF file; use the adapter's safetensors files"),
        (save_for_another_base, BaseMismatchError, "a different base"),
        (shutil.rmtree, AdapterNotFoundError, "does not exist"),
    ],
)
def test_a_bad_adapter_changes_nothing(
    make: Make, root: Path, spoil: Callable[[Path], None], error: type[TailoraError], message: str
) -> None:
    registry = make("legal", "chat")
    before = registry.list(), keys(registry)
    spoil(root / "legal")
    for name, replace in (("new", False), ("chat", True)):
        with pytest.raises(error, match=message):
            registry.load(name, "legal", replace=replace)
    assert (registry.list(), keys(registry)) == before
    torch.testing.assert_close(answer(registry, "chat"), expected(root / "chat"))


def test_layers_that_cannot_be_computed_by_row_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    LoRAModel(base, LoRAConfig(r=2, target_modules=["1"])).save_adapter(tmp_path / "attention")
    adapter_set = AdapterSet(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), {})
    adapter_set.base_model.load_state_dict(base.state_dict())
    with pytest.raises(RowsError, match="a different adapter per row is not supported"):
        AdapterRegistry(adapter_set, Pauses(), "base", tmp_path).load("attention", "attention")
    assert not adapter_set.adapters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "printable characters") for name in ("", " x", "a\nb", "x" * 201)),
        ("a@1", "reserved for scales"),
        ("base", r"base model has this name; .*\(--name NAME\) .*\(--adapter NAME=PATH\)$"),
        ("legal", "already loaded; unload it, or replace it with load_inplace"),
    ],
)
def test_an_invalid_name_or_one_in_use_is_refused(make: Make, name: str, message: str) -> None:
    registry = make("legal")
    with pytest.raises(AdapterError, match=f"(?s)invalid adapter name .*{message}") as caught:
        registry.load(name, "chat")
    assert not isinstance(caught.value, AdapterNotFoundError)
    assert [info.name for info in registry.list()] == ["legal"]


def test_names_that_do_not_exist_are_not_found(make: Make) -> None:
    registry = make("legal")
    for call in (registry.unload, registry.acquire):
        with pytest.raises(AdapterNotFoundError, match="available: base, legal; did you mean legal"):
            call("legl")
    with pytest.raises(AdapterNotFoundError, match="unknown model 'x'"):
        registry.acquire("x@0.5")
    with pytest.raises(AdapterNotFoundError, match="is the base model"):
        registry.unload("base")
    registry.unload("legal")
    assert keys(registry) == []
    with pytest.raises(AdapterNotFoundError):
        registry.acquire("legal")


# ---- Paths


def link_a_folder(root: Path, outside: Path) -> str:
    (root / "link").symlink_to(outside)
    return "link"


def link_a_file(root: Path, outside: Path) -> str:
    (root / "inner").mkdir()
    for file in outside.iterdir():
        (root / "inner" / file.name).symlink_to(file)
    return "inner"


def link_the_adapter_of_a_run(root: Path, outside: Path) -> str:
    (root / "run").mkdir()
    (root / "run" / "adapter").symlink_to(outside)
    return "run"


@pytest.mark.parametrize(
    "path_to",
    [
        "{outside}",
        "../outside",
        "legal/../../outside",
        "{root}-beside",
        "/etc/passwd",
        "legal\0",
        link_a_folder,
        link_a_file,
        link_the_adapter_of_a_run,
    ],
)
def test_no_path_leads_out_of_the_root(make: Make, root: Path, path_to: str | Callable[[Path, Path], str]) -> None:
    outside = Path(shutil.copytree(root / "legal", root.parent / "outside"))
    registry = make()
    path = path_to.format(root=root, outside=outside) if isinstance(path_to, str) else path_to(root, outside)
    with pytest.raises(ConfigError, match="is outside the server's adapter folder") as caught:
        registry.load("x", path)
    assert str(outside) not in str(caught.value).replace(str(path), "")
    assert keys(registry) == []


def test_paths_within_the_root_and_trusted_ones(make: Make, root: Path) -> None:
    outside = Path(shutil.copytree(root / "legal", root.parent / "outside"))
    (root / "current").symlink_to("legal")
    registry = make()
    for name, path in (("a", "current"), ("b", root / "legal"), ("c", "chat/../legal"), ("d", str(root / "chat"))):
        registry.load(name, path)
    registry.load("trusted", outside, trusted=True)
    assert len({key.partition("#")[2] for key in keys(registry)}) == 2  # a, b, c and trusted have the same content
    no_root = make(root=None)
    no_root.load("trusted", outside, trusted=True)
    with pytest.raises(ConfigError, match="--adapters"):
        no_root.load("x", "legal")
    with pytest.raises(AdapterNotFoundError):
        registry.load("x", "y" * 5000)


def test_a_folder_that_may_not_be_read(make: Make, root: Path) -> None:
    (root / "legal").chmod(0)
    with modes_obeyed(), pytest.raises(FormatError, match=r"cannot read .*; check its permissions"):
        make("legal")
    (root / "legal").chmod(0o700)


# ---- Replacing


def test_requests_in_flight_end_with_the_adapter_that_they_began_with(make: Make, root: Path) -> None:
    registry = make("legal", "chat")
    old, scaled = registry.acquire("legal"), registry.acquire("legal", 0.5)
    save(root / "new", seed=3, r=4)
    registry.load("legal", "new", replace=True)
    torch.testing.assert_close(logits(registry, old.key), expected(root / "legal"))
    torch.testing.assert_close(logits(registry, scaled.key), expected(root / "legal", 0.5))
    torch.testing.assert_close(answer(registry, "legal"), expected(root / "new"))
    old.close()
    old.close()
    assert old.key in keys(registry)  # the scaled one has the same tensors
    scaled.close()
    registry.unload("chat")
    assert len(keys(registry)) == 1
    torch.testing.assert_close(answer(registry, "legal"), expected(root / "new"))


def test_an_unloaded_adapter_serves_its_requests(make: Make, root: Path) -> None:
    registry = make("legal")
    with registry.acquire("legal") as handle:
        registry.unload("legal")
        torch.testing.assert_close(logits(registry, handle.key), expected(root / "legal"))
        registry.load("legal", "legal")  # the same content: the name means it again
        assert keys(registry) == [handle.key]
    answer(registry, "legal")
    assert registry.in_memory() == {"legal"}


def test_the_same_content_has_the_same_key_and_another_one_has_not(make: Make, root: Path) -> None:
    registry = make("legal")
    [key] = keys(registry)
    registry.load("legal", "legal", replace=True)
    assert keys(registry) == [key]
    file = root / "legal" / "adapter_model.safetensors"
    stored = file.read_bytes()
    file.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))  # one bit of a weight
    registry.load("legal", "legal", replace=True)
    assert keys(registry) != [key]
    assert len(keys(registry)) == 1


# ---- Scales


@pytest.mark.parametrize(
    ("model", "scale", "folder", "strength"),
    [
        ("legal", 0.5, "legal", 0.5),
        ("legal@-2", 0.5, "legal", -1),
        ("dora@0.3", None, "dora", 0.3),
        ("rows@0.3", None, "rows", 0.3),
    ],
)
def test_scales_are_exact(
    make: Make, root: Path, model: str, scale: float | None, folder: str, strength: float
) -> None:
    registry = make(*ADAPTERS)
    result = expected(root / folder, strength)
    torch.testing.assert_close(answer(registry, model, scale), result, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer(registry, folder), expected(root / folder))  # as before


def test_equal_requests_share_one_adapter_without_tensors_of_its_own(make: Make) -> None:
    registry = make("legal", "chat")
    for model, scale in (("legal@0.5", None), ("legal", 0.5), ("legal@1", 0.5), ("legal@0.50", None)):
        answer(registry, model, scale)
    assert len(keys(registry)) == 3
    part, scaled = (
        registry._adapter_set.adapters[key].low_rank["model.layers.0.mlp.up_proj"] for key in keys(registry)[::2]
    )
    assert part.lora_A is scaled.lora_A
    assert answer(registry, "legal@0").equal(answer(registry, "base"))
    assert len(keys(registry)) == 3


@pytest.mark.parametrize(
    ("model", "scale", "message"),
    [
        ("legal@x", None, "'legal@x': expected a finite scale, as in legal@0.5"),
        ("legal@1e308", 1e308, "finite"),
        ("legal@1e38", None, "scales its update .* by .*e\\+38; .* Use a smaller scale"),
        ("legal@-300", 300, "the limit is 100000"),
        ("base", 0.5, "is the base"),
        ("head@0.5", None, "modules trained in full"),
    ],
)
def test_invalid_scales_are_refused(make: Make, model: str, scale: float | None, message: str) -> None:
    registry = make("legal", "head")
    with pytest.raises(ConfigError, match=message):
        registry.acquire(model, scale)
    assert len(keys(registry)) == 2
    assert requests(registry) == 0


@pytest.mark.parametrize("settings", [{"lora_alpha": 1e39, "r": 8}, {"lora_alpha": 3e5}])
def test_an_adapter_with_an_excessive_scale_is_refused(make: Make, root: Path, settings: dict[str, Any]) -> None:
    save(root / "huge", **{"r": 2, **settings})
    registry = make("chat")
    with pytest.raises(ConfigError, match=r"'huge' scales its update .* by .*, including lora_alpha / r"):
        registry.load("huge", "huge")
    assert len(keys(registry)) == 1


def test_terms_that_overflow_the_model_s_precision_are_refused(root: Path) -> None:
    registry = AdapterRegistry(AdapterSet(chat_model().half().eval(), {}), Pauses(), "base", root)
    save(root / "steep", seed=10**4, r=2)
    for name in ("steep", "head"):
        registry.load(name, name)
    with pytest.raises(ConfigError, match=r"'steep@9000' overflows float16 at .*; use a smaller scale"):
        registry.acquire("steep@9000")
    save(root / "steeper", seed=10**9, r=2)
    with pytest.raises(ConfigError, match="'steeper' overflows float16"):
        registry.load("steeper", "steeper")


# ---- Memory


def test_the_least_recently_used_adapter_makes_room_and_comes_back(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make("legal", budget=2.5)
    registry.load("b", "legal")
    answer(registry, "legal")
    registry.load("c", "legal")
    assert registry.in_memory() == {"legal", "c"}
    before = registry.list()
    monkeypatch.setattr(registry_module, "time", SimpleNamespace(time=lambda: 4e9))  # later
    torch.testing.assert_close(answer(registry, "b"), expected(root / "legal"))
    assert registry.in_memory() == {"b", "c"}
    assert [info.created for info in registry.list()] == [info.created for info in before]


def test_adapters_in_use_stay_in_memory(make: Make) -> None:
    registry = make("legal", budget=2.5)
    registry.load("b", "legal")
    with registry.acquire("legal@0.5") as handle:
        busy = pytest.raises(MemoryInUseError, match=r"try again later, or .* larger --adapter-memory")
        with registry.acquire("b"), busy:
            registry.load("c", "legal")
        assert handle.key in keys(registry)
        assert registry.in_memory() == {"legal", "b"}
    answer(registry, "b")
    registry.load("c", "legal")
    assert registry.in_memory() == {"b", "c"}
    assert len(keys(registry)) == 2  # the scaled one went before its tensors


def test_an_adapter_that_is_too_large_is_refused(make: Make, root: Path) -> None:
    registry = make("legal", budget=2)
    save(root / "large", r=8)
    with pytest.raises(
        MemoryLimitError, match=r"needs [\d.]+ kB; the limit for all adapters together is [\d.]+ kB"
    ) as caught:
        registry.load("large", "large")
    assert not isinstance(caught.value, MemoryInUseError)
    assert registry.in_memory() == {"legal"}


@pytest.mark.parametrize("change", ["content", "removed", "linked"])
def test_files_are_checked_again_when_an_adapter_comes_back(
    make: Make, root: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make("legal", budget=1.5)
    outside = Path(shutil.copytree(root / "legal", root.parent / "outside"))
    registry.load("b", "legal")
    shutil.rmtree(root / "legal")
    if change == "content":
        save(root / "legal", seed=5, r=2)
        torch.testing.assert_close(answer(registry, "legal"), expected(root / "legal"))
        assert "'legal' have changed" in caplog.text
    elif change == "removed":
        with pytest.raises(AdapterNotFoundError, match="does not exist"):
            registry.acquire("legal")
    else:
        (root / "legal").symlink_to(outside)
        with pytest.raises(ConfigError, match="outside"):
            registry.acquire("legal")
    assert registry.in_memory() == ({"legal"} if change == "content" else {"b"})


def test_clients_that_ask_for_many_scales_do_not_fill_the_memory(make: Make) -> None:
    registry = make("legal")
    for number in range(MOST_SCALED + 5):
        registry.acquire("legal", 0.5 + number / 100).close()
    assert len(keys(registry)) == MOST_SCALED + 1
    assert requests(registry) == 0


# ---- Threads


def test_many_threads_always_get_an_adapter_that_is_there(make: Make, root: Path) -> None:
    registry = make("legal", budget=4)
    save(root / "new", seed=1, r=2)
    registry.load("b", "legal")

    models = ("legal", "b", "legal@0.5", "b@2", "base")

    def ask(number: int) -> Counter[str]:
        answered = Counter[str]()
        for i in range(12):
            model = models[(number + i) % 5]
            with suppress(MemoryInUseError), registry.acquire(model) as handle:
                time.sleep(0.001)
                assert handle.key is None or handle.key in registry._adapter_set.adapters
                answered[model] += 1
        return answered

    def change() -> Counter[str]:
        loaded = Counter[str]()
        for i in range(12):
            with suppress(MemoryInUseError):
                registry.load("legal", path := ("new", "legal")[i % 2], replace=True)
                loaded[f"load {path}"] += 1
            registry.list()
        return loaded

    with ThreadPoolExecutor(6) as pool:
        futures = [*(pool.submit(ask, number) for number in range(5)), pool.submit(change)]
        done = sum((future.result(timeout=60) for future in futures), Counter[str]())
    assert done.keys() == {*models, "load new", "load legal"}
    registry.load("c", "legal")
    assert sorted(keys(registry)) == sorted(registry._residents)
    assert requests(registry) == 0
    current = {named.key.partition("#")[2] for named in registry._named.values()}
    digests = {key.partition("#")[2].partition("@")[0] for key in keys(registry)}
    assert digests <= current
