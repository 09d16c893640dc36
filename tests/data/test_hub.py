"""Whether a model is on the Hub, asked of a server on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tailora.data.readers import check_model_exists
from tailora.errors import ConfigError

ASK = "import sys; from tailora.data.readers import check_model_exists; check_model_exists(sys.argv[1])"

FOUND = b'{"id": "no-such-model"}'


@contextmanager
def hub(status: int) -> Iterator[tuple[str, list[str]]]:
    """Address of a server that answers everything with `status`, and the models that it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):  # the Hub's library has questions of its own
                asked.append(self.path.removeprefix("/api/models/"))
            self.send_response(status)
            self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
            self.send_header("Content-Length", str(len(FOUND)))
            self.end_headers()
            self.wfile.write(FOUND)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def asking(name: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, since the address is read when the Hub's library is imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    command = [sys.executable, "-c", ASK, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "the Hub has no such model, or a private one"), (200, ""), (503, "")],
    ids=["absent", "there", "busy"],
)
def test_the_hub_is_asked_once(status: int, said: str, tmp_path: Path) -> None:
    with hub(status) as (address, asked):
        done = asking("no-such-model", address, tmp_path)
    assert asked == ["no-such-model"]
    assert said in done.stderr
    assert bool(done.returncode) == bool(said)


def test_a_hub_that_cannot_be_reached_is_not_asked_again(tmp_path: Path) -> None:
    with hub(200) as (address, _):
        pass  # nobody listens at this address any more
    done = asking("no-such-model", address, tmp_path)
    assert "ConfigError: model 'no-such-model': no such folder here, and the Hub cannot be reached" in done.stderr
    assert "Retry" not in done.stderr


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    with hub(404) as (address, asked):
        done = asking("owner/name", address, tmp_path)
    assert (done.returncode, asked) == (0, []), done.stderr


def test_what_is_no_id_is_not_asked_for_and_the_nearest_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ConfigError, match=r"it is not a Hub id; did you mean my-model\?"):
        check_model_exists("./my-modle")
