"""Adapters on the Hub: uploaded to and downloaded from a stand-in for its server, by huggingface_hub's own client."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hub_server
import peft
import pytest
import torch
from hub_server import FILES, TOKEN, Repository
from huggingface_hub import ModelCard, constants
from tiny import chat_model
from tiny_adapters import adapted, logits, token_ids

from tailora import LoRAConfig, LoRAModel
from tailora.cli.models import parse_adapters
from tailora.errors import ConfigError, FetchError, FormatError, MergeError
from tailora.formats.hub import DEMO_MODEL, OF_DEMO, check_model_exists, is_written_by_tailora
from tailora.formats.io import safetensors_bytes
from tailora.formats.upload import check_nothing_private

hub = hub_server.hub  # the fixture


def test_an_adapter_is_pushed_and_comes_back(hub: Any) -> None:
    model = adapted()
    address = model.push_to_hub("user/adapter", private=True, token=TOKEN, tags=["poems"], commit_message="First")
    assert address == f"http://127.0.0.1:{hub.server_port}/user/adapter/commit/{hub.commit}"
    assert sorted(hub.files) == FILES
    created = next(json.loads(body) for _, path, body in hub.requests if path == "/api/repos/create")
    assert (created["name"], created["organization"], created["visibility"]) == ("adapter", "user", "private")
    assert any(b'"summary": "First"' in body for _, _, body in hub.requests)
    assert ModelCard(hub.files["README.md"].decode()).data.tags == ["lora", "tailora", "poems"]
    assert is_written_by_tailora(hub.files["README.md"])

    loaded = LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN)
    assert torch.equal(logits(loaded), logits(model))

    hub.files["README.md"] = b"my own words"
    model.push_to_hub("user/adapter", token=TOKEN)
    assert hub.files["README.md"] == b"my own words"


@pytest.mark.parametrize("is_relative", [False, True])
def test_what_is_pushed_names_no_path_of_this_machine(
    is_relative: bool, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = chat_model()
    base.config._name_or_path = "bases/mine" if is_relative else f"{tmp_path}/bases/mine"
    model = adapted(base=base)
    model.add_adapter("b", LoRAConfig(r=2))
    model.push_to_hub("user/adapter", token=TOKEN)
    assert sorted(hub.files) == sorted([*FILES, *(f"b/{name}" for name in FILES)])
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content
        if name.endswith("adapter_config.json"):
            assert json.loads(content)["base_model_name_or_path"] == "mine"
    loaded = LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.usefixtures("hub")
def test_commands_take_an_adapter_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().push_to_hub("user/adapter", token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folders = parse_adapters(["user/adapter", "poems=user/adapter"])
    assert list(folders) == ["adapter", "poems"]
    assert all((folder / "adapter_model.safetensors").is_file() for folder in folders.values())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FetchError, match="adapter 'user/other' is not a local folder, and the Hub does not provide it: Cannot find"
    ):
        parse_adapters(["user/other"])


def fetched(hub: Any) -> set[str]:
    """Names of the files that were downloaded."""
    paths = [path.partition("?")[0] for command, path, _ in hub.requests if command == "GET"]
    return {path.partition("/resolve/")[2].partition("/")[2] for path in paths if "/resolve/" in path}


def test_only_the_files_of_the_adapter_are_downloaded_once(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = adapted()
    source.add_adapter("b", LoRAConfig(r=2))
    source.push_to_hub("user/adapter", token=TOKEN)
    hub.files.update(
        {"model.safetensors": b"huge", "checkpoint-5/adapter_model.safetensors": b"old", "run.json": b"{}"}
    )
    model = LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN)
    assert fetched(hub) == {"adapter_config.json", "adapter_model.safetensors"}
    hub.requests.clear()
    model.load_adapter("user/adapter", name="b", subfolder="b", token=TOKEN)
    assert model.adapters["b"].r == 2
    assert fetched(hub) == {"b/adapter_config.json", "b/adapter_model.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    LoRAModel.from_pretrained(chat_model(), "user/adapter")


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
        ["a/adapter_model.safetensors"],
        ["one.safetensors", "two.safetensors"],
    ],
    ids=["a model", "a pickle", "in a folder", "several files"],
)
def test_a_repository_without_an_adapter_is_refused_with_what_it_has(files: list[str], hub: Any) -> None:
    hub.files.update(dict.fromkeys(files, b"{}"))
    message = rf"(?s)user/adapter on the Hub has no adapter: expected .*contains {', '.join(files)}\. Use the folder"
    with pytest.raises(FetchError, match=message):
        LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN)
    assert fetched(hub) <= {"adapter_config.json"}


TOKEN_IN_FILE = f"hf_{'x' * 34}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("merges.txt", f"a b\nh f_\n\u0120{TOKEN_IN_FILE} c"),
        ("vocab.json", json.dumps({f"\u0120{TOKEN_IN_FILE}": 1})),
        ("tokenizer.json", TOKEN_IN_FILE.replace("h", r"\u0068")),
        ("tokenizer.model", f"\0\x01{TOKEN_IN_FILE}\x02"),
        ("special_tokens_map.json", TOKEN_IN_FILE.replace("_", r"\\u005f")),  # JSON in a string of JSON
        ("added_tokens.json", r'{"from": "\/home\/me\/model"}'),
        ("tokenizer_config.json", r'{"chat_template": "first\n/home/me/model"}'),
        ("tokenizer_config.json", r'{"name_or_path": "C:\\Users\\name"}'),
        ("chat_template.jinja", "{# from /data/bases/mine #}"),
        ("README.md", TOKEN_IN_FILE),
    ],
)
def test_tokens_and_paths_are_found_in_files_of_any_kind(name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{name} contains "):
        check_nothing_private(tmp_path, {name: content.encode()}, "/data/bases/mine")


def test_the_header_of_the_weights_is_searched_and_words_are_no_paths(tmp_path: Path) -> None:
    weights = safetensors_bytes({TOKEN_IN_FILE: torch.zeros(1)}, {"format": "pt"})
    with pytest.raises(FormatError, match=r"the metadata of adapter_model\.safetensors contains hf_xxx"):
        check_nothing_private(tmp_path, {"adapter_model.safetensors": weights}, "")
    words = json.dumps({"/home/me": 1, "hf_token": 2, "https://example.org/home/me/x": 3}).encode()
    check_nothing_private(tmp_path, {"vocab.json": words, "README.md": b"see https://example.org/home/me/x"}, "")


def test_only_the_main_process_pushes(hub: Any) -> None:
    assert adapted().push_to_hub("user/adapter", token=TOKEN, is_main_process=False) == ""
    assert not hub.requests


def test_a_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted()
    model.save_pretrained("user/adapter")
    assert torch.equal(logits(LoRAModel.from_pretrained(chat_model(), "user/adapter")), logits(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_save_pretrained_writes_all_adapters_as_peft_does_and_never_the_base(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("b", LoRAConfig(r=2))
    model.save_pretrained(tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted([*FILES, "b"])
    read = peft.PeftModel.from_pretrained(chat_model(), str(tmp_path / "all")).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=token_ids()).logits, logits(model), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "b", safe_serialization=True, selected_adapters=["b"])
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["b"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.base_model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_save_pretrained_refuses_what_it_would_not_do(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="only written as safetensors"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(LookupError, match="unknown adapter 'c'"):
        model.save_pretrained(tmp_path / "a", selected_adapters=["default", "c"])
    with model.merged(), pytest.raises(MergeError, match="cannot save an adapter"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("base", "in_metadata", "words"),
    [
        ("owner/base", "owner/base", "owner/base"),
        ("/home/me/models/base", None, "base, a local folder"),
        (r"C:\models\base", None, "base, a local folder"),
        ("/x/models--owner--base/snapshots/0123", "owner/base", "owner/base"),
        ("here", None, "here, a local folder"),
        ("gpt2", None, "gpt2"),  # an id of the Hub from before there were owners
        ("demo", DEMO_MODEL, f"{DEMO_MODEL} ({OF_DEMO})"),
        ("/home/me/demo-1/SmolLM2-135M-Instruct", DEMO_MODEL, f"{DEMO_MODEL} ({OF_DEMO})"),
        (DEMO_MODEL, DEMO_MODEL, DEMO_MODEL),
    ],
)
def test_the_card_names_the_base_and_the_settings(
    base: str, in_metadata: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    model = adapted({"r": 4, "use_rslora": True})
    model.base_model.config._name_or_path = base
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == in_metadata  # the Hub refuses a commit whose base is no repository
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert f"Base model: {words}\n" in card.text
    assert "/home" not in card.content
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base  # by which PEFT loads it here, without network
    assert "| r | 4 |" in card.text
    assert "| use_rslora | True |" in card.text


def test_a_revision_is_listed_and_downloaded(hub: Any) -> None:
    """Also of a repository whose only file has a name of its own, which is found in a list."""
    main, other = adapted(), adapted({"r": 2})
    main.push_to_hub("user/adapter", token=TOKEN)
    other.push_to_hub("user/adapter", token=TOKEN, revision="other")
    for revision, r in ((None, 4), ("other", 2)):
        loaded = LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN, revision=revision)
        assert loaded.adapters["default"].r == r
    branches = hub.repositories["user/adapter"].branches
    branches["one"] = {"sketch[v2].safetensors": b"damaged", "preview.png": b""}
    with pytest.raises(FormatError, match=r"sketch\[v2\].safetensors is not a complete"):
        LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN, revision="one")
    with pytest.raises(FetchError, match="Revision Not Found"):
        LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN, revision="absent")


@pytest.mark.parametrize("subfolder", ["../x", "/x", "b/../..", "."])
def test_a_subfolder_is_one_of_the_repository(subfolder: str, hub: Any) -> None:
    adapted().push_to_hub("user/adapter", token=TOKEN)
    hub.requests.clear()
    with pytest.raises(ConfigError, match=rf"subfolder '{re.escape(subfolder)}' is not .* such as a/b"):
        LoRAModel.from_pretrained(chat_model(), "user/adapter", token=TOKEN, subfolder=subfolder)
    assert not hub.requests


# ---- Base models


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (404, "RepoNotFound", ""),
            r"is not a local folder, and the Hub has no such model \(a private one needs HF_TOKEN\)",
        ),
        (None, r"model 'owner/name' is not a local folder, and the Hub cannot be reached \(Server disconnected"),
        ((503, "", ""), ""),
        ("there", ""),
        (b"{}", "and the server's response is not from the Hub"),
    ],
    ids=["absent", "unreachable", "busy", "there", "no id"],
)
def test_the_hub_is_asked_once_for_a_model(
    answer: Any, message: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["owner/name"] = Repository()
    if isinstance(answer, bytes):
        hub.odd_answers["/api/models/"] = answer
    elif answer != "there":
        hub.fail["GET", "/api/models/owner/name"] = answer
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_model_exists("owner/name")
    assert [path for _, path, _ in hub.requests] == ["/api/models/owner/name"]


def test_a_model_in_the_cache_needs_no_hub(hub: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    check_model_exists("owner/name")
    assert hub.requests == []


def test_a_name_that_is_no_hub_id_is_refused_with_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ConfigError, match=r"it is not a Hub id; did you mean my-model\?"):
        check_model_exists("./my-modle")
