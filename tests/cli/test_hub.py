"""`tailora push` and `tailora pull`, with a stand-in for the Hub's server that huggingface_hub's own client uses."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from command_line import call, found
from hub_server import FILES, READ_TOKEN, TOKEN, Server
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from tiny import chat_model
from tiny_adapters import adapted

from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import main
from tailora.formats.run_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    METADATA_KEY,
    PASSPORT,
    REPORT,
    write_system_message,
)
from tailora.verify.passport import ADAPTER as UNSCALED
from tailora.verify.passport import BASE, Passport, Probe, write_passport

hub = hub_server.hub  # the fixture


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, chats_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, whose base model was given as a relative path."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "secret_chats.jsonl").write_text(chats_text)
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = ["--max-steps", "3", "--r", "4", "--validation-split", ".25", "--learning-rate", "3e-3"]
        sources = ["--model", "models/tiny", "--data", "secret_chats.jsonl", "--output-dir", "run"]
        assert main(["train", *sources, *settings, "--device", "cpu"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "work" / "run")


def pushed(*tokens: object) -> dict[str, Any]:
    return found("push", *tokens)


def card_of(hub: Server, name: str = "user/adapter", branch: str = "main") -> ModelCard:
    return ModelCard(hub.repositories[name].branches[branch][CARD].decode())


def no_files(hub: Server) -> bool:
    return not any(any(repository.branches.values()) for repository in hub.repositories.values())


# ---- push


def test_a_run_is_pushed_and_comes_back(
    hub: Server, run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pushed(run, "user/adapter", "--model", "owner/base", "--message", "First")
    url = f"{hub.address}/user/adapter/commit/{hub.commit}"
    assert result == {"repo": "user/adapter", "url": url, "commit": hub.commit, "files": FILES}
    assert sorted(hub.files) == FILES
    assert hub.repositories["user/adapter"].private
    commits = [body for _, path, body in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    assert b'"summary": "First"' in commits[0]

    monkeypatch.chdir(run.parent)
    code, out, _ = call("pull", "user/adapter", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["output_dir"], facts["commit"], facts["base"], facts["ranks"]) == (
        "adapter",
        hub.commit,
        "owner/base",
        [4],
    )
    assert facts["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(path.name for path in Path("adapter").iterdir()) == FILES
    before, after = load_file(run / ADAPTER / ADAPTER_WEIGHTS), load_file(Path("adapter") / ADAPTER_WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    prompt = ["--model", str(tiny_model), "--prompt", "What colour?", "--max-new-tokens", "4", "--temperature", "0"]
    _, answer, _ = call("predict", "--adapter", run, *prompt)
    assert call("predict", "--adapter", "adapter", *prompt)[:2] == (0, answer)
    assert call("predict", "--adapter", "user/adapter", *prompt)[:2] == (0, answer)


def test_the_card_says_what_the_run_measured(hub: Server, run: Path) -> None:
    pushed(run, "user/adapter", "--model", "owner/base", "--license", "apache-2.0")
    card = card_of(hub)
    assert card.data.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tailora"],
    }
    report = json.loads((run / REPORT).read_text())
    result, text = report["result"], card.text
    assert report["verdict"] in text
    for when in ("before", "after"):
        low, high = result[f"eval_loss_{when}_95"]
        assert f"| {result[f'eval_loss_{when}']:.3f} | {low:.3f} to {high:.3f} |" in text
    for line in (
        "# adapter",
        f"| tokens | {report['run']['data']['tokens']} |",
        "| learning_rate | 3e-3 |",
        "tailora chat --adapter user/adapter\n",
        "tailora serve --model owner/base --adapter adapter=user/adapter",
        f"torch {torch.__version__}",
    ):
        assert line in text, line


def test_nothing_private_is_uploaded(hub: Server, run: Path, finished: Path, tiny_model: Path) -> None:
    (run / ADAPTER / "optimizer.bin").write_bytes(b"\x80\x04")
    code, _, err = call("push", run, "user/adapter")
    assert code == 0
    assert "others cannot download the adapter's base model tiny; set its Hub id with --model" in err
    assert "not uploaded: optimizer.bin" in err
    with safe_open(run / ADAPTER / ADAPTER_WEIGHTS, framework="pt") as file:
        assert str(tiny_model) in str(file.metadata()[METADATA_KEY])  # where the base is on this machine
    everything = b"".join(hub.files.values()) + b"".join(body for *_, body in hub.requests)
    secrets = (tiny_model, finished, run, "secret_chats", "models/tiny", "What colour is thing")
    assert [text for text in secrets if str(text).encode() in everything] == []
    assert json.loads(hub.files[ADAPTER_CONFIG])["base_model_name_or_path"] == "tiny"
    pushed(run, "user/adapter", "--samples")
    assert "> **prompt:** What colour is thing" in card_of(hub).text


def test_private_files_and_links_are_refused_before_anything_is_sent(hub: Server, run: Path, tmp_path: Path) -> None:
    adapter = run / ADAPTER
    (adapter / "tokenizer_config.json").write_text('{"name_or_path": "/home/me/secret"}')
    (adapter / "tokenizer.json").write_text('{"vocab": {"/home/me": 1}}')  # a word is no path
    card = (adapter / CARD).read_bytes()
    (adapter / CARD).write_text(f"Made by me, see https://example.org/home/me.html and file://{adapter}\n")
    code, _, err = call("push", run, "user/adapter")
    assert (code, "contain local paths or a token. Remove them: 2 problems" in err) == (2, True), err
    assert "tokenizer_config.json contains /home/me/secret" in err
    assert f"README.md contains {adapter}" in err
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (adapter / CARD).unlink()
    (tmp_path / "mine").write_text("{}")
    for name in ("vocab.json", CARD):
        (adapter / name).symlink_to(tmp_path / "mine")
        code, _, err = call("push", run, "user/adapter")
        assert (code, f"{name} is a link, and only files in the folder itself are uploaded" in err) == (2, True), err
        (adapter / name).unlink()
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file(tensors, adapter / ADAPTER_WEIGHTS, {"ss_output_dir": "/home/me/loras"})
    code, _, err = call("push", run, "user/adapter")
    assert (code, "the metadata of adapter_model.safetensors contains /home/me/loras" in err) == (2, True)
    assert not hub.requests
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    (adapter / CARD).write_bytes(card)
    assert pushed(run, "user/adapter")["files"] == [*FILES, "tokenizer.json", "tokenizer_config.json"]


def test_the_card_of_a_classifier_has_its_metrics_and_its_command(
    hub: Server, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"thing {i}", "label": ["good", "bad"][i % 2]} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--task", "sequence-classification", "--max-steps", "2", "--validation-split", ".25", "--device", "cpu"]
    assert main(["train", "--model", str(tiny_model), "--data", "rows.jsonl", "--output-dir", "out", *settings]) == 0
    pushed("out", "user/adapter")
    card = card_of(hub)
    assert card.data.pipeline_tag == "text-classification"
    metrics = json.loads(Path("out", REPORT).read_text())["metrics"]
    accuracy = next(metric for metric in metrics if metric["name"] == "accuracy")
    assert f"| accuracy | {accuracy['before']:.3f} |" in card.text
    command = "tailora predict user/adapter --model BASE --data ROWS.jsonl --output PREDICTIONS.jsonl"
    assert command in card.text
    assert "vLLM" not in card.text
    code, out, _ = call("pull", "user/adapter")
    assert code == 0
    assert "tailora predict adapter --model BASE --data" in out


def test_the_passport_goes_with_the_weights_that_it_is_of(hub: Server, run: Path, tmp_path: Path) -> None:
    passport = run / ADAPTER / PASSPORT
    logprobs = {BASE: [-1.0], UNSCALED: [-1.0]}
    probe = Probe(3, ["é"], logprobs, logprobs, text="the cat is")
    write_passport(run / ADAPTER, Passport(base_model="models/tiny", probes=[probe]))
    content = json.loads(passport.read_text())
    digest = content["weights"][ADAPTER_WEIGHTS]
    pushed(run, "user/adapter", "--model", "owner/base")
    new = sha256(hub.files[ADAPTER_WEIGHTS]).hexdigest()
    assert new != digest  # the file named the folder of the base
    expected = {**content, "base_model": "owner/base", "weights": {ADAPTER_WEIGHTS: new}}
    assert json.loads(hub.files[PASSPORT]) == expected
    assert call("pull", "user/adapter", "--output-dir", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / PASSPORT).read_text()) == expected

    passport.unlink()
    pushed(run, "user/adapter")
    assert PASSPORT not in hub.files  # the one that was there is of other weights
    passport.write_text(json.dumps({**content, "weights": {ADAPTER_WEIGHTS: "0" * 64}}))
    code, _, err = call("push", run, "user/adapter")
    assert code == 2
    assert "passport.json does not belong to the weights next to it" in err


def test_a_card_that_someone_wrote_or_edited_stays(hub: Server, run: Path) -> None:
    mine = b"---\nlanguage: en\n---\n\n# Poems\n\nMy own words.\n"
    hub.files[CARD] = mine
    code, _, err = call("push", run, "user/adapter")
    assert code == 0
    assert "README.md of user/adapter is kept, because it was written or edited by hand; delete it for a new one" in err
    assert hub.files[CARD] == mine
    del hub.files[CARD]
    pushed(run, "user/adapter")
    assert b"## Results" in hub.files[CARD]
    pushed(run, "user/adapter", "--license", "mit")  # tailora's own card is replaced
    assert card_of(hub).data.license == "mit"
    for before, after in ((b"# adapter", b"# My adapter"), (b"license: mit", b"license: other")):
        hub.files[CARD] = edited = hub.files[CARD].replace(before, after)
        pushed(run, "user/adapter", "--license", "mit")
        assert hub.files[CARD] == edited

    own = run / ADAPTER / CARD
    own.write_text(own.read_text().replace("LoRA adapter of", "My LoRA adapter of"))
    pushed(run, "user/other")
    assert "My LoRA adapter of 14 layers" in card_of(hub, "user/other").text


def test_an_adapter_without_a_run_and_a_public_repository(hub: Server, tmp_path: Path) -> None:
    model = adapted({"r": 2, "use_dora": True, "rank_pattern": {"q_proj": 3}})
    model.base_model.config._name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "dora")
    write_system_message(tmp_path / "dora", "Be brief.\nAlways.")
    pushed(tmp_path / "dora", "user/dora", "--public", "--revision", "v2")
    repository = hub.repositories["user/dora"]
    assert not repository.private
    assert (sorted(repository.branches["v2"]), repository.branches["main"]) == ([*FILES, "system_message.txt"], {})
    text = card_of(hub, "user/dora", "v2").text
    assert "layers of rank 2 to 3" in text
    assert "\n> Be brief.\n> Always.\n" in text
    assert "Results" not in text
    repository.private = False
    code, _, err = call("push", tmp_path / "dora", "user/dora")
    assert (
        code,
        "user/dora is public, so everyone would see the adapter. To upload it anyway, use --public" in err,
    ) == (2, True)
    repository.private = True
    assert "user/dora is still private" in call("push", tmp_path / "dora", "user/dora", "--public")[2]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["absent", "user/adapter"], "absent is not a folder"),
        (["RUN", "adapter"], "invalid repository 'adapter': expected owner/name"),
        (["RUN", "a/b/c"], "invalid repository 'a/b/c'"),
        (["RUN", "user/adapter", "--model", "tiny"], "--model tiny: expected the base model's Hub id, owner/name"),
    ],
)
def test_wrong_arguments_are_refused(tokens: list[str], message: str, run: Path, hub: Server) -> None:
    code, _, err = call("push", *(run if token == "RUN" else token for token in tokens))
    assert (code, message in err, hub.requests) == (2, True, []), err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, _: (f / ADAPTER_WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda f, t: save_file({**t, min(t): t[min(t)] * torch.nan}, f / ADAPTER_WEIGHTS), "is not finite"),
        (lambda f, _: (f.parent / REPORT).write_text("{"), "report.json is not JSON"),
    ],
    ids=["no weights", "not finite", "report"],
)
def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_sent(
    damage: Callable[[Path, dict[str, Any]], Any], message: str, run: Path, hub: Server
) -> None:
    damage(run / ADAPTER, load_file(run / ADAPTER / ADAPTER_WEIGHTS))
    code, _, err = call("push", run / ADAPTER, "user/adapter")
    assert (code, message in err, hub.requests) == (2, True, []), err


# ---- pull


def test_only_what_an_adapter_needs_is_fetched(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.add_adapter("b", LoRAConfig(r=2))
    model.push_to_hub("user/adapter")
    others = ("adapter_model.bin", "optimizer.pt", "training_args.bin", "samples.json", "x/passport.json")
    hub.files.update(dict.fromkeys(others, b"no"), **{"tokenizer.json": b"{}", "b/passport.json": b"{}"})
    hub.requests.clear()
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("pull", "user/adapter")
    assert code == 0
    assert sorted(path.name for path in Path("adapter").iterdir()) == [*FILES, "tokenizer.json"]
    assert not Path("adapter", ADAPTER_WEIGHTS).is_symlink()
    assert not [path for _, path, _ in hub.requests if any(name in path for name in others)]
    assert "tailora chat --model BASE --adapter adapter\n" in out
    loaded = LoRAModel.from_pretrained(chat_model(), "adapter")
    assert loaded.adapters["default"].r == 4
    code, _, err = call("pull", "user/adapter")
    assert (code, "adapter already exists" in err) == (2, True)
    assert call("pull", "user/adapter", "--overwrite", "--subfolder", "b")[0] == 0
    assert sorted(path.name for path in Path("adapter").iterdir()) == [*FILES, PASSPORT]
    assert LoRAModel.from_pretrained(chat_model(), "adapter").adapters["default"].r == 2
    Path("adapter", "mine.txt").write_text("mine")
    assert call("pull", "user/adapter", "--overwrite")[0] == 2
    assert Path("adapter", "mine.txt").exists()


def test_an_adapter_of_mlx_and_a_lora_file_are_fetched(hub: Server, tmp_path: Path) -> None:
    adapted().export(tmp_path / "mlx", "mlx")
    hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()})
    code, out, err = call("pull", "user/adapter", "--output-dir", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["ranks"] == [4]
    hub.files.clear()
    hub.files["lora.safetensors"] = b"damaged"
    code, _, err = call("pull", "user/adapter", "--output-dir", tmp_path / "file")
    assert (code, "user/adapter/lora.safetensors is not a complete safetensors file" in err) == (2, True), err
    assert not (tmp_path / "file").exists()


# ---- Failures


def with_infinity(content: bytes) -> bytes:
    tensors = load(content)
    tensors[min(tensors)][0, 0] = torch.inf
    return save(tensors)


Fail = Callable[[Server, pytest.MonkeyPatch], Any]
PUSH, PULL = ["push", "adapter", "user/adapter"], ["pull", "user/adapter", "--output-dir", "out"]
FAILURES: list[tuple[list[str], Fail, int, str]] = [
    (
        PUSH,
        lambda _, patch: (patch.delenv("HF_TOKEN"), patch.setattr(constants, "HF_TOKEN_PATH", "/absent")),
        2,
        "uploading to the Hub needs an access token: log in with `hf auth login`, or set HF_TOKEN",
    ),
    (PUSH, lambda _, patch: patch.setenv("HF_TOKEN", READ_TOKEN), 1, "You don't have the rights to create a model"),
    (PUSH, lambda hub, _: hub.fail.update({("POST", "/commit/"): None}), 1, "cannot upload the adapter"),  # broken off
    (
        PULL,
        lambda hub, _: hub.files.update({ADAPTER_WEIGHTS: with_infinity(hub.files[ADAPTER_WEIGHTS])}),
        2,
        "model.layers.0.mlp.down_proj.lora_A.weight is not finite",
    ),
    (PULL, lambda hub, _: hub.files.pop(ADAPTER_WEIGHTS), 1, "user/adapter on the Hub has no adapter"),
    (PULL, lambda hub, _: hub.odd_answers.update({"/api/models/": b"[1]"}), 1, "response is not from the Hub"),
]


@pytest.mark.parametrize(("tokens", "fail", "code", "message"), FAILURES)
def test_a_failed_transfer_writes_nothing_and_says_why(
    tokens: list[str], fail: Fail, code: int, message: str, hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted()
    model.save_adapter("adapter")
    if tokens[0] == "pull":
        model.push_to_hub("user/adapter")
    fail(hub, monkeypatch)
    got, out, err = call(*tokens, "--json")
    assert (got, message in err) == (code, True), err
    assert json.loads(out.splitlines()[-1])["error"]["exit_code"] == code
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert tokens[0] == "pull" or no_files(hub)
