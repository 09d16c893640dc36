"""`tailora push` and `tailora pull`, with a stand-in for the Hub's server that huggingface_hub's own client uses."""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from hub_server import FILES, READ_TOKEN, TOKEN, Repository, Server
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import chat_model
from tiny_adapters import adapted, logits
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.hub import public_base_name
from tailora.cli.main import main
from tailora.formats.hub import DEMO_MODEL, OF_DEMO
from tailora.formats.metadata import METADATA_KEY
from tailora.formats.offline import OfflineAdapter
from tailora.formats.run_folder import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, PASSPORT, REPORT
from tailora.report.model_card import card_body, completed_card
from tailora.verify import passport as passports
from tailora.verify.passport import Passport, Probe, Variant, write_passport

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
        assert main(["train", *sources, *settings, "--device", "cpu", "--passport", "none"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "work" / "run")


def call(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[int, str, str]:
    code = main(list(map(str, tokens)))
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err


def pushed(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict[str, Any]:
    code, out, err = call(capsys, "push", *tokens, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def card_of(hub: Server, name: str = "user/adapter", branch: str = "main") -> ModelCard:
    return ModelCard(hub.repositories["model", name].branches[branch][CARD].decode())


def no_files(hub: Server) -> bool:
    return not any(any(repository.branches.values()) for repository in hub.repositories.values())


# ---- push


def test_a_run_is_pushed_and_comes_back(
    hub: Server, run: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pushed(capsys, run, "user/adapter", "--model", "owner/base", "--message", "First")
    url = f"{hub.address}/user/adapter/commit/{hub.commit}"
    assert result == {"repo": "user/adapter", "url": url, "commit": hub.commit, "files": FILES}
    assert sorted(hub.files) == FILES
    assert hub.repositories["model", "user/adapter"].private
    commits = [body for _, path, body in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    assert b'"summary": "First"' in commits[0]

    monkeypatch.chdir(run.parent)
    code, out, _ = call(capsys, "pull", "user/adapter", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["output_dir"], facts["commit"], facts["base"], facts["ranks"]) == (
        "adapter",
        hub.commit,
        "owner/base",
        [4],
    )
    assert facts["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    report = json.loads((run / REPORT).read_text())["result"]
    assert facts["loss"]["before"] == f"{report['eval_loss_before']:.3f}"
    assert facts["loss"]["after_95"] == "{:.3f} to {:.3f}".format(*report["eval_loss_after_95"])
    assert sorted(path.name for path in Path("adapter").iterdir()) == FILES
    before, after = load_file(run / ADAPTER / ADAPTER_WEIGHTS), load_file(Path("adapter") / ADAPTER_WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    prompt = ["--model", str(tiny_model), "--prompt", "What colour?", "--max-new-tokens", "4", "--temperature", "0"]
    _, answer, _ = call(capsys, "generate", "--adapter", run, *prompt)
    assert call(capsys, "generate", "--adapter", "adapter", *prompt)[:2] == (0, answer)
    assert call(capsys, "generate", "--adapter", "user/adapter", *prompt)[:2] == (0, answer)


def test_the_card_says_what_the_run_measured(hub: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pushed(capsys, run, "user/adapter", "--model", "owner/base", "--license", "apache-2.0")
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
        "| rows | 24 |",
        f"| tokens | {report['run']['data']['tokens']} |",
        "| task | causal-lm |",
        "| r | 4 |",
        "| lora_alpha | 32 |",
        "| learning_rate | 3e-3 |",
        "| steps | 3 |",
        "| seed | 0 |",
        'AutoPeftModelForCausalLM.from_pretrained("user/adapter")',
        "tailora chat --adapter user/adapter\n",
        "tailora serve --model owner/base --adapter adapter=user/adapter",
        "vllm serve owner/base --enable-lora --max-lora-rank 8 --lora-modules adapter=user/adapter",
        f"torch {torch.__version__}",
    ):
        assert line in text, line


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_the_lines_for_peft_in_the_card_compute_the_same(
    hub: Server, run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub.repositories["model", "owner/base"] = Repository(branches={"main": base})
    pushed(capsys, run, "user/adapter", "--model", "owner/base")
    (lines,) = re.findall(r"```py\n(.*?)```", card_of(hub).text, re.DOTALL)
    assert call(capsys, "pull", "user/adapter", "--output-dir", tmp_path / "out")[0] == 0
    names: dict[str, Any] = {}
    exec(lines.replace("user/adapter", str(tmp_path / "out")), names)  # PEFT itself asks the Hub's own address
    ours = LoRAModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), run)
    torch.testing.assert_close(logits(names["model"]), logits(ours), rtol=1e-4, atol=1e-5)


def test_nothing_private_is_uploaded(
    hub: Server, run: Path, finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / ADAPTER / "optimizer.bin").write_bytes(b"\x80\x04")
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 0
    assert "the files call the base model tiny, which others cannot fetch; give its Hub id with --model" in err
    assert "not uploaded: optimizer.bin" in err
    with safe_open(run / ADAPTER / ADAPTER_WEIGHTS, framework="pt") as file:
        assert str(tiny_model) in str(file.metadata()[METADATA_KEY])  # where the base is on this machine
    everything = b"".join(hub.files.values()) + b"".join(body for *_, body in hub.requests)
    secrets = (tiny_model, finished, run, "secret_chats", "models/tiny", "What colour is thing")
    assert [text for text in secrets if str(text).encode() in everything] == []
    assert json.loads(hub.files[ADAPTER_CONFIG])["base_model_name_or_path"] == "tiny"
    pushed(capsys, run, "user/adapter", "--samples")
    assert "> **prompt:** What colour is thing" in card_of(hub).text


@pytest.mark.parametrize("path", ["/home/me/secret", "/Users/me", r"C:\\Users\\me\\x", "HERE", f"hf_{'x' * 34}"])
def test_paths_in_files_that_stay_as_they_are_are_refused(
    path: str, hub: Server, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    path = path.replace("HERE", str(run))
    (run / ADAPTER / "tokenizer_config.json").write_text(f'{{"name_or_path": "{path}"}}')
    (run / ADAPTER / "tokenizer.json").write_text('{"vocab": {"/home/me": 1}}')  # a token is no path
    (run / ADAPTER / CARD).write_text(f"Made by me, see https://example.org/home/me.html and file://{path}\n")
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 2
    assert "name paths of a machine, or a token; take them out: tokenizer_config.json names" in err
    (run / ADAPTER / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 2
    assert "README.md names" in err
    assert "example" not in err
    assert no_files(hub)
    (run / ADAPTER / CARD).unlink()
    files = pushed(capsys, run, "user/adapter")["files"]
    assert files == [*FILES, "tokenizer.json", "tokenizer_config.json"]


def test_metadata_of_other_tools_that_name_a_path_are_refused(
    hub: Server, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / ADAPTER / ADAPTER_WEIGHTS
    tensors = load_file(weights)
    save_file(tensors, weights, {"ss_output_dir": "/home/me/loras"})
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert (code, "the metadata of adapter_model.safetensors names /home/me/loras" in err) == (2, True)
    assert not hub.requests
    save_file(tensors, weights)
    assert call(capsys, "push", run, "user/adapter")[0] == 0


def test_the_card_of_a_classifier_has_its_metrics_and_its_command(
    hub: Server, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"thing {i}", "label": ["good", "bad"][i % 2]} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--task", "sequence-classification", "--max-steps", "2", "--validation-split", ".25", "--device", "cpu"]
    assert main(["train", "--model", str(tiny_model), "--data", "rows.jsonl", "--output-dir", "out", *settings]) == 0
    pushed(capsys, "out", "user/adapter")
    card = card_of(hub)
    assert card.data.pipeline_tag == "text-classification"
    metrics = json.loads(Path("out", REPORT).read_text())["metrics"]
    accuracy = next(metric for metric in metrics if metric["name"] == "accuracy")
    assert f"| accuracy | {accuracy['before']:.3f} |" in card.text
    command = "tailora predict user/adapter --model BASE --data ROWS.jsonl --output PREDICTIONS.jsonl"
    assert command in card.text
    assert "vLLM" not in card.text
    words = command.replace("BASE", str(tiny_model)).replace("ROWS.jsonl", "rows.jsonl").split()
    assert main(words[1:]) == 0
    assert len(Path("PREDICTIONS.jsonl").read_text().splitlines()) == 24
    capsys.readouterr()
    code, out, _ = call(capsys, "pull", "user/adapter")
    assert code == 0
    assert "tailora predict adapter --model BASE --data" in out


def test_the_passport_goes_with_the_weights_that_it_is_of(
    hub: Server, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passport = run / ADAPTER / PASSPORT
    variants = {name: Variant("scale") for name in passports.REQUIRED}
    probe = Probe(3, ["é"], {name: [-1.0] for name in variants}, text="the cat is")
    write_passport(run / ADAPTER, Passport("models/tiny", "base", variants, [probe]))
    content = json.loads(passport.read_text())
    digest = content["weights"][ADAPTER_WEIGHTS]
    pushed(capsys, run, "user/adapter", "--model", "owner/base")
    new = sha256(hub.files[ADAPTER_WEIGHTS]).hexdigest()
    assert new != digest  # the file named the folder of the base
    expected = {**content, "base_model": "owner/base", "weights": {ADAPTER_WEIGHTS: new}}
    assert json.loads(hub.files[PASSPORT]) == expected
    assert call(capsys, "pull", "user/adapter", "--output-dir", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / PASSPORT).read_text()) == expected

    passport.write_text(json.dumps({**content, "texts": "held-out"}))
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 0
    assert "not uploaded: passport.json" in err
    assert PASSPORT not in hub.files  # the one that was there is of other weights
    assert PASSPORT in pushed(capsys, run, "user/adapter", "--samples")["files"]
    passport.write_text(json.dumps({**content, "texts": "held-out", "version": 1}))
    assert PASSPORT not in pushed(capsys, run, "user/adapter")["files"]  # whatever its version, it stays here
    code, _, err = call(capsys, "push", run, "user/adapter", "--samples")
    assert code == 2
    assert "passport.json has version 1, this program reads 2" in err
    passport.write_text(json.dumps({**content, "weights": {ADAPTER_WEIGHTS: "0" * 64}}))
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 2
    assert "passport.json belongs to other weights than those beside it" in err


def test_the_words_of_others_stay_and_the_yaml_is_completed(
    hub: Server, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = "---\nlanguage: en\ntags:\n- poems\nlibrary_name: mine\n---\n\n# Poems\n\nMy own words.\n"
    hub.files[CARD] = mine.encode()
    code, _, err = call(capsys, "push", run, "user/adapter", "--model", "owner/base")
    assert code == 0
    assert "the words of the README.md of user/adapter stay, since someone wrote or edited them; --replace-card" in err
    card = card_of(hub)
    assert card.text == "\n# Poems\n\nMy own words.\n"
    data = card.data.to_dict()
    assert (data["language"], data["library_name"], data["base_model"]) == ("en", "mine", "owner/base")
    assert data["tags"] == ["poems", "lora", "tailora"]

    pushed(capsys, run, "user/adapter", "--model", "owner/base", "--replace-card")
    card = card_of(hub)
    assert "My own words" not in card.text
    assert card.data.to_dict()["language"] == "en"
    hub.files[CARD] = hub.files[CARD].replace(b"owner/base", b"owner/old", 1)  # in the YAML
    pushed(capsys, run, "user/adapter", "--model", "owner/base", "--license", "mit")
    data = card_of(hub).data.to_dict()
    assert (data["base_model"], data["license"], data["language"]) == ("owner/base", "mit", "en")
    hub.files[CARD] = hub.files[CARD].replace(b"# adapter", b"# My adapter")
    pushed(capsys, run, "user/adapter", "--model", "owner/base")
    assert "# My adapter" in card_of(hub).text  # it was edited

    hub.files[CARD] = b"No YAML"
    pushed(capsys, run, "user/adapter")
    assert card_of(hub).text == "\nNo YAML"
    hub.files[CARD] = b"\xff"
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert (code, "its README.md is not UTF-8" in err) == (1, True)
    hub.files[CARD] = b"---\ntags: [\n---\nx"
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert (code, "YAML at the top of the model card cannot be read" in err) == (2, True)


def test_a_card_that_was_written_in_the_folder_is_uploaded(
    hub: Server, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsigned = (run / ADAPTER / CARD).read_text().partition("<!--")[0].rstrip() + "\n"  # as earlier versions wrote it
    (run / ADAPTER / CARD).write_text(unsigned)
    pushed(capsys, run, "user/adapter")
    assert "## Results" in card_of(hub).text
    (run / ADAPTER / CARD).write_text(unsigned.replace("LoRA adapter of", "My LoRA adapter of"))
    pushed(capsys, run, "user/other", "--model", "owner/base")
    assert "My LoRA adapter of 14 layers" in card_of(hub, "user/other").text
    assert card_of(hub, "user/other").data.to_dict()["base_model_relation"] == "adapter"


def test_an_adapter_without_a_run_and_a_public_repository(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted({"r": 2, "use_dora": True, "rank_pattern": {"q_proj": 3}})
    model.base_model.config._name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "dora")
    pushed(capsys, tmp_path / "dora", "user/dora", "--public", "--revision", "v2")
    repository = hub.repositories["model", "user/dora"]
    assert not repository.private
    assert (sorted(repository.branches["v2"]), repository.branches["main"]) == (FILES, {})
    text = card_of(hub, "user/dora", "v2").text
    assert "layers of rank 2 to 3" in text
    assert "vLLM does not read use_dora, rank_pattern: `tailora export user/dora --to vllm" in text
    assert "Results" not in text
    repository.private = False
    code, _, err = call(capsys, "push", tmp_path / "dora", "user/dora")
    assert (code, "user/dora is public: everyone would see the adapter. Give --public" in err) == (2, True)
    repository.private = True
    assert "user/dora stays private" in call(capsys, "push", tmp_path / "dora", "user/dora", "--public")[2]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # that huggingface_hub does not follow
def test_large_files_are_uploaded_before_the_commit(hub: Server, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.uses_large_files = True
    hub.fail[("PUT", "/large/")] = (400, "", "out of order")
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 1
    assert "the adapter is not uploaded to 'user/adapter': Error while uploading 'adapter_model.safetensors'" in err
    assert "out of order; nothing is committed, so try again" in err
    assert no_files(hub)
    hub.fail.clear()
    pushed(capsys, run, "user/adapter")
    assert sorted(hub.files) == FILES


def failing(hub: Server, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    match what:
        case "no token":
            monkeypatch.delenv("HF_TOKEN")
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/absent")
        case "unknown token":
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        case "read token":
            monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        case "read token, old repository":
            monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
            hub.repositories["model", "user/adapter"] = Repository()
        case "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case "no server":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        case "hidden repository":
            hub.repositories["model", "user/adapter"] = Repository()
            hub.fail[("GET", "/api/models/user/adapter")] = (401, "RepoNotFound", "")
        case "broken off":
            hub.fail[("POST", "/commit/")] = None
        case "refused by the storage":
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
            hub.uses_large_files = True
            hub.fail[("GET", "/xet-write-token/")] = (403, "", "no")
        case "refused YAML":
            hub.fail[("POST", "/validate-yaml")] = (400, "", "license")
        case "too many":
            hub.fail[("POST", "/commit/")] = (429, "", "slow down")


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("no token", 2, "there is no token here: log in with `hf auth login`, or set HF_TOKEN"),
        ("unknown token", 1, "the Hub does not know this token"),
        ("read token", 1, "the token may not do this (You don't have the rights to create a model under the namespace"),
        ("read token, old repository", 1, "the token may not do this (You need write access)"),
        ("offline", 1, "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE)"),
        ("no server", 1, "the Hub cannot be reached"),
        ("broken off", 1, "the Hub cannot be reached"),
        ("refused by the storage", 1, "the Hub cannot be reached (Network error: Request error: HTTP status client"),
        ("refused YAML", 1, "Invalid metadata in README.md"),
        ("hidden repository", 1, "the Hub has something under this name that this token cannot see"),
        ("too many", 1, "the Hub answers no more for now (slow down); wait some minutes"),
    ],
)
def test_what_hinders_a_push_is_said_and_nothing_is_half_there(
    what: str,
    code: int,
    message: str,
    hub: Server,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(hub, monkeypatch, what)
    got, out, err = call(capsys, "push", run, "user/adapter", "--json")
    assert (got, message in err) == (code, True), err
    assert json.loads(out.splitlines()[-1])["error"]["exit_code"] == code
    assert no_files(hub)


def test_ctrl_c_says_that_all_files_are_there_or_none(
    hub: Server, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", stop)
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert code == 130
    assert "interrupted: user/adapter has all files or none; the same command uploads them again" in err
    assert no_files(hub)


def test_the_hub_keeps_a_data_set_of_the_same_name_apart(
    hub: Server, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["dataset", "user/adapter"] = Repository(type="dataset")
    code, _, err = call(capsys, "pull", "user/adapter", "--output-dir", run / "new")
    assert (code, "'user/adapter' is a dataset on the Hub, and no model or adapter" in err) == (1, True)
    code, _, err = call(capsys, "push", run, "user/adapter")
    assert (code, "the Hub has a dataset of this name, too" in err) == (0, True)
    assert sorted(hub.files) == FILES


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["absent", "user/adapter"], "absent is not a folder"),
        (["RUN", "adapter"], "'adapter' cannot be a repository: write owner/name"),
        (["RUN", "a/b/c"], "'a/b/c' cannot be a repository"),
        (["RUN", "user/adapter", "--model", "tiny"], "--model tiny: give the base model's Hub id, owner/name"),
        (["RUN", "user/adapter", "--message", " "], "the Hub takes no commit without a message: give one"),
        (["EMPTY", "user/adapter"], "has no adapter_model.safetensors"),
        (["FULL", "user/adapter"], "holds a whole model, of --method full"),
        (["PICKLE", "user/adapter"], "adapter_model.bin is a pickle, which can run code"),
        (["MLX", "user/adapter"], "holds adapters.safetensors, and no adapter_model.safetensors"),
        (["NAN", "user/adapter"], "lora_A.weight is not finite"),
        (["SHAPE", "user/adapter"], "for a rank of 4 in the settings"),
        (["MISSING", "user/adapter"], "without the other factor"),
        (["NEWS", "user/adapter"], "report.json is not JSON"),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused_before_anything_is_sent(
    tokens: list[str], message: str, run: Path, hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    weights = run / ADAPTER / ADAPTER_WEIGHTS
    with safe_open(weights, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    first = min(tensors)
    match tokens[0]:
        case "FULL":
            (folder / "model").mkdir()
        case "PICKLE":
            (folder / "adapter_model.bin").write_bytes(b"\x80")
        case "MLX":
            (folder / "adapters.safetensors").write_bytes(b"")
        case "NAN":
            tensors[first][0, 0] = torch.nan
        case "SHAPE":
            tensors[first] = tensors[first][:2].contiguous()
        case "MISSING":
            del tensors[first]
        case "NEWS":
            (run / REPORT).write_text("{")
    save_file(tensors, weights, metadata)
    bad = run if tokens[0] in ("RUN", "NAN", "SHAPE", "MISSING", "NEWS") else folder
    given = [tokens[0] if tokens[0] == "absent" else str(bad), *tokens[1:]]
    code, _, err = call(capsys, "push", *given)
    assert (code, message in err) == (2, True), err
    assert not hub.requests


@pytest.mark.parametrize(
    ("base", "public"),
    [
        ("owner/base", "owner/base"),
        ("models/here", "here"),
        ("/srv/models/Llama-3/", "Llama-3"),
        (r"C:\models\Llama-3", "Llama-3"),
        ("/srv/hub/models--owner--base/snapshots/0123", "owner/base"),
        ("DEMO", "demo"),
        ("gpt2", "gpt2"),
        ("", None),
    ],
)
def test_what_others_call_the_base_model(
    base: str, public: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAILORA_HOME", "/srv/tailora")
    Path("models", "here").mkdir(parents=True)
    base = base.replace("DEMO", "/srv/tailora/demo-1/SmolLM2-135M-Instruct")
    Path(ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": base}))
    assert public_base_name(tmp_path, None) == public
    assert public_base_name(tmp_path, "owner/other") == "owner/other"


def test_the_card_gives_the_demo_s_model_its_hub_id() -> None:
    settings = {"base_model_name_or_path": "demo", "task_type": "CAUSAL_LM"}
    body = card_body("user/chats", settings, OfflineAdapter(LoRAConfig(), {}, {}, None), None)
    text, _ = completed_card(None, settings, body, None)
    assert ModelCard(text).data.base_model == DEMO_MODEL
    assert f"LoRA adapter for `{DEMO_MODEL}` ({OF_DEMO})" in text
    assert "tailora serve --model demo --adapter chats=user/chats" in text  # with the weights of its training
    assert f"vllm serve {DEMO_MODEL} --enable-lora" in text


# ---- pull


def test_only_what_an_adapter_needs_is_fetched(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    model.add_adapter("b", LoRAConfig(r=2))
    model.push_to_hub("user/adapter")
    others = ("adapter_model.bin", "optimizer.pt", "training_args.bin", "samples.json", "x/passport.json")
    hub.files.update(dict.fromkeys(others, b"no"), **{"tokenizer.json": b"{}", "b/passport.json": b"{}"})
    hub.requests.clear()
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "pull", "user/adapter")
    assert code == 0
    assert sorted(path.name for path in Path("adapter").iterdir()) == [*FILES, "tokenizer.json"]
    assert not Path("adapter", ADAPTER_WEIGHTS).is_symlink()
    assert not [path for _, path, _ in hub.requests if any(name in path for name in others)]
    assert "not named: give it with --model" in out
    assert "tailora chat --model BASE --adapter adapter\n" in out
    assert "tailora serve --model BASE --adapter adapter=adapter\n" in out
    loaded = LoRAModel.from_pretrained(chat_model(), "adapter")
    assert loaded.adapters["default"].r == 4
    code, _, err = call(capsys, "pull", "user/adapter")
    assert (code, "adapter exists already" in err) == (2, True)
    assert call(capsys, "pull", "user/adapter", "--overwrite", "--subfolder", "b")[0] == 0
    assert sorted(path.name for path in Path("adapter").iterdir()) == [*FILES, PASSPORT]
    assert LoRAModel.from_pretrained(chat_model(), "adapter").adapters["default"].r == 2
    Path("adapter", "mine.txt").write_text("mine")
    assert call(capsys, "pull", "user/adapter", "--overwrite")[0] == 2
    assert Path("adapter", "mine.txt").exists()


def test_an_adapter_of_mlx_and_a_lora_file_are_fetched(
    hub: Server, tmp_path: Path, tiny_model: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_model), "--output", str(tmp_path / "mlx")]
    assert call(capsys, "export", run, "--to", "mlx", *options)[0] == 0
    hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()})
    code, out, err = call(capsys, "pull", "user/adapter", "--output-dir", tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["ranks"] == [4]
    hub.files.clear()
    save_file({"a": torch.tensor([torch.inf])}, tmp_path / "x.safetensors")
    hub.files["lora.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    code, _, err = call(capsys, "pull", "user/adapter", "--output-dir", tmp_path / "file")
    assert (code, "user/adapter/lora.safetensors: a is not finite" in err) == (2, True), err
    assert not (tmp_path / "file").exists()


def damaged(hub: Server, monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path) -> None:
    adapted().push_to_hub("user/adapter")
    match what:
        case "not finite":
            (tmp_path / "x").write_bytes(hub.files[ADAPTER_WEIGHTS])
            with safe_open(tmp_path / "x", framework="pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            tensors[min(tensors)][0, 0] = torch.inf
            save_file(tensors, tmp_path / "x", metadata)
            hub.files[ADAPTER_WEIGHTS] = (tmp_path / "x").read_bytes()
        case "cut off":
            hub.files[ADAPTER_WEIGHTS] = hub.files[ADAPTER_WEIGHTS][:-8]
        case "another rank":
            settings = json.loads(hub.files[ADAPTER_CONFIG])
            hub.files[ADAPTER_CONFIG] = json.dumps({**settings, "r": 8}).encode()
        case "no adapter":
            del hub.files[ADAPTER_WEIGHTS]
        case "no repository":
            hub.repositories.clear()
        case "broken off":
            hub.fail[("GET", f"/resolve/{hub.commit}/{ADAPTER_WEIGHTS}")] = (500, "", "out of order")
        case "unknown token":
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        case "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case "no server":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("not finite", 2, "user/adapter: model.layers.0.mlp.down_proj.lora_A.weight is not finite"),
        ("cut off", 2, "user/adapter/adapter_model.safetensors is not a complete safetensors file"),
        ("another rank", 2, "for a rank of 8 in the settings"),
        ("no adapter", 1, "user/adapter on the Hub holds no adapter"),
        ("no repository", 1, "the Hub has no such repository, or a private one; HF_TOKEN"),
        ("unknown token", 1, "the Hub does not know this token"),
        ("offline", 1, "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE)"),
        ("no server", 1, "the Hub cannot be reached"),
        ("broken off", 1, "'user/adapter' is not fetched"),
        ("no revision", 1, "give a branch, tag or commit that exists"),
    ],
)
def test_what_hinders_a_pull_is_said_and_nothing_is_written(
    what: str,
    code: int,
    message: str,
    hub: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged(hub, monkeypatch, what, tmp_path)
    monkeypatch.chdir(tmp_path)
    revision = ["--revision", "none"] if what == "no revision" else []
    got, out, err = call(capsys, "pull", "user/adapter", "--output-dir", "out", "--json", *revision)
    assert (got, message in err) == (code, True), err
    assert json.loads(out.splitlines()[-1])["error"]["exit_code"] == code
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
