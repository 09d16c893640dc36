"""`tailora verify`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import verified_server
from command_line import check_refused
from verified_server import MODELS, TOKENIZER, Request, base_model, running, stand_in

from tailora.cli.main import main
from tailora.formats.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PASSPORT
from tailora.verify import server_client
from tailora.verify.passport import read_passport
from tailora.verify.server_client import MOST_BYTES
from tailora.verify.server_verdict import STEP

root, url = verified_server.root, verified_server.url  # the fixtures


def test_the_command_says_its_verdict(url: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", url, "--adapter", str(root / "legal")]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "The server uses this adapter as it was trained." in output.out
    assert f"prompts to model legal at {url}" in output.err
    assert f"prompts to the base model tiny at {url}" in output.err
    weights = ["verify", url, "--adapter", str(root / "legal" / ADAPTER_WEIGHTS)]
    check_refused("--base: unknown model 'tinny'; the server has tiny, legal", *weights, "--base", "tinny")
    assert main([*command, "--model", "other"]) == 4
    output = capsys.readouterr()
    assert read_passport(root / "legal").weights[ADAPTER_WEIGHTS] in "".join(output.out.split())
    assert main([*command, "--model", "legal@2", "--json"]) == 4
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["verdict"] == "scaled"
    assert result["scale"] == pytest.approx(2, abs=STEP / 2)


def test_a_missing_verification_file_is_written_where_the_base_is_at_hand(
    url: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", shutil.copytree(root / "legal", tmp_path / "legal")
    (adapter / PASSPORT).unlink()
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    command = ["verify", url, "--adapter", str(adapter)]
    prepare = ["verify", "--prepare", "--adapter", str(adapter)]
    check_refused(f"contains no passport.json; create one with `tailora {' '.join(prepare)}`", *command)
    base_model().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    (adapter / PASSPORT).write_text("{}")
    check_refused(
        "expected the address of a server, such as http://127.0.0.1:8000, or --prepare", *prepare[:1], *prepare[2:]
    )
    assert main(prepare) == 0
    assert len(read_passport(adapter).probes) > 15
    (adapter / PASSPORT).unlink()
    assert main(command) == 0
    assert f"writing {adapter / PASSPORT}, for `tailora verify`" in " ".join(capsys.readouterr().err.split())


def test_another_base_shows_in_the_answers_of_the_base(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(root, seed=1) as url:
        assert main(["verify", url, "--adapter", str(root / "legal"), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "other", "\n".join(found["evidence"])
    assert any(sentence.startswith("The base under its own name, ") for sentence in found["evidence"])


def test_the_key_of_the_environment_is_sent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, sent in (("k", "Bearer k"), (None, None)):
        requests: list[Request] = []
        monkeypatch.delenv("TAILORA_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("TAILORA_API_KEY", key)
        with stand_in(MODELS, requests=requests) as url:
            assert main(["verify", url, "--adapter", str(root / "legal")]) == 1  # it answers no prompt
        assert {request.path for request in requests} >= {"/v1/models", "/v1/completions"}
        assert {request.key for request in requests} == {sent}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/v1/models": (200, b"<html>")}, "which is not OpenAI-compatible"),
        ({"/v1/models": (200, {"hello": 1})}, "returned no list of models"),
        ({"/v1/models": (401, {"error": "key"})}, "set TAILORA_API_KEY"),
        ({**MODELS, "/v1/completions": (200, {"choices": []})}, "the server's response contains no choices"),
        ({"/v1/models": (307, "https://example.org/v1/models")}, "redirects to https://example.org/v1/models; use"),
        ({"/v1/models": (200, b" " * (MOST_BYTES + 1))}, "returned more than 16 MB"),
        (
            MODELS,
            "did not answer any prompt: /v1/completions returned 404 not found; /v1/chat/completions returned 404",
        ),
    ],
)
def test_a_server_that_cannot_be_asked_ends_with_1(
    root: Path, answers: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in(answers) as url:
        assert main(["verify", url, "--adapter", str(root / "legal")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_nobody_listens_and_a_password_in_the_address_is_not_shown(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "http://me:secret@127.0.0.1:9", "--adapter", str(root / "legal")]) == 1
    error = capsys.readouterr().err
    assert "cannot reach http://" in error
    assert "secret" not in error


def test_a_missing_endpoint_is_told_with_its_reason(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(server_client.ENDPOINTS, "text", "/v1/absent")
    assert main(["verify", url, "--adapter", str(root / "legal"), "--json"]) == 0  # the chats tell
    output = capsys.readouterr()
    assert "/v1/absent was skipped: the server returned 404" in " ".join(output.err.split())
    assert any("not checked: fewer than 6 answers" in sentence for sentence in json.loads(output.out)["evidence"])


@pytest.mark.parametrize("key", ["secret\nline", "schlüssel"])
def test_what_is_no_key_is_refused_and_not_shown(
    key: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAILORA_API_KEY", key)
    assert main(["verify", "http://127.0.0.1:9", "--adapter", str(root / "legal")]) == 2
    error = capsys.readouterr().err
    assert "TAILORA_API_KEY contains" in error
    assert key[:6] not in error


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://[::1", "http://x:99999"])
def test_what_is_no_address_is_refused(url: str, root: Path) -> None:
    assert main(["verify", url, "--adapter", str(root / "legal")]) == 2
