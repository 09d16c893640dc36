"""Images from URLs: what is downloaded, the limits, and addresses that URLs in a data set must not reach."""

import asyncio
import hashlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from tiny_vision import save_image, tiny_llava

from tailora.data import remote_images
from tailora.data.chat_template import DataSettings
from tailora.data.images import read_image
from tailora.data.prepare import prepare
from tailora.data.remote_images import download_image
from tailora.errors import DataError, WriteError

MIB = 1 << 20
CONTENT = b"pixels" * 1000


class Server(ThreadingHTTPServer):
    """url: of the server.    asked: Host and path of each request."""

    daemon_threads = True
    url: str
    asked: list[tuple[str, str]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        name = self.path.strip("/")
        if name.startswith("to="):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to="))
            self.end_headers()
        elif name == "slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.drip(b"X-A: b\r\n")
        elif name in ("a.png", "endless", "slow"):
            self.send_response(200)
            self.end_headers()
            if name == "a.png":
                self.wfile.write(CONTENT)
            self.drip({"endless": bytes(MIB), "slow": b"x"}.get(name, b""), 0 if name == "endless" else 0.05)
        else:
            self.send_error(404)

    def drip(self, content: bytes, seconds: float = 0.05) -> None:
        try:
            while content:
                self.wfile.write(content)
                time.sleep(seconds)
        except OSError:  # the client has closed the connection
            pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on 127.0.0.1, which counts as the only public address of the local network."""
    is_public = remote_images._is_public
    monkeypatch.setattr(remote_images, "_is_public", lambda text: text == "127.0.0.1" or is_public(text))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.url, server.asked = f"http://127.0.0.1:{server.server_port}", []
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def resolve(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Lookups of names return these addresses, in order. Returns the names that were looked up."""
    names: list[str] = []
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        text = host.decode() if isinstance(host, bytes) else host
        if text[:1].isdigit() or ":" in text:
            return original(host, port, *args, **options)
        names.append(text)
        return [entry for address in answers[len(names) - 1] for entry in original(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


def test_the_content_is_downloaded_also_after_redirects(server: Server) -> None:
    assert download_image(f"{server.url}/a.png", MIB) == CONTENT
    assert download_image(f"{server.url}/to=/to=/a.png", MIB) == CONTENT


def test_the_connection_goes_to_the_address_that_was_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    names = resolve(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])  # a second lookup would lead to the local network
    assert download_image(f"http://images.example:{server.server_port}/a.png", MIB) == CONTENT
    assert names == ["images.example"]
    assert server.asked == [(f"images.example:{server.server_port}", "/a.png")]


def test_relative_redirects_stay_on_the_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    names = resolve(monkeypatch, ["127.0.0.1"], ["127.0.0.1"])
    assert download_image(f"http://images.example:{server.server_port}/to=/a.png", MIB) == CONTENT
    assert names == ["images.example"] * 2
    assert {host for host, _ in server.asked} == {f"images.example:{server.server_port}"}


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.0.0.2", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *(
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[fe80::1]",
            "[fd00::1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[::7f00:1]",
        ),
        *("[::ffff:100.64.0.1]", "[::ffff:0:10.0.0.1]", "[64:ff9b:1::a00:1]", "[fec0::1]"),
        *("224.0.0.1", "2130706433", "0x7f.1", "user@127.0.0.3", "[::7f00:1]"),
    ],
)
def test_the_local_network_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(httpx.AsyncClient, "send")  # so that nothing is reached if it is not refused
    with pytest.raises(DataError, match=r"is on the local network \(.*\), which URLs in a data set must not reach"):
        download_image(f"http://{host}/a.png", MIB)


def test_a_host_with_one_local_address_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, ["127.0.0.1", "10.0.0.1"])
    with pytest.raises(DataError, match=r"local network \(10\.0\.0\.1\)"):
        download_image(f"http://images.example:{server.server_port}/a.png", MIB)
    assert not server.asked


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        ("http://127.0.0.2/a.png", "local network"),
        ("//[::1]/a.png", "local network"),
        ("file:///etc/passwd", "not an http"),
        ("ftp://127.0.0.1/a.png", "not an http"),
    ],
)
def test_redirects_are_checked_like_the_first_url(server: Server, location: str, cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        download_image(f"{server.url}/to={location}", MIB)
    assert len(server.asked) == 1


def test_a_redirect_loop_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "MOST_REDIRECTS", 2)
    with pytest.raises(DataError, match="redirected more than 2 times; use its final URL"):
        download_image(f"{server.url}/{'to=/' * 9}a.png", MIB)
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", ["slow", "slow-headers"])
def test_a_slow_response_ends(server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"was not downloaded within 0.5 seconds; download it to a file"):
        download_image(f"{server.url}/{name}", MIB)
    assert time.monotonic() - started < 5


def test_a_slow_lookup_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait(5))
    monkeypatch.setattr(remote_images, "SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"was not downloaded within 0.1 seconds"):
        download_image("http://images.example/a.png", MIB)
    is_over.set()
    assert time.monotonic() - started < 4


def test_an_endless_response_ends(server: Server) -> None:
    with pytest.raises(DataError, match="has more than 2 MiB; save it with a smaller size"):
        download_image(f"{server.url}/endless", 2 * MIB)


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("{}/missing", "missing.* the server answers with 404 Not Found"),
        ("http://a..b/a.png", "cannot be downloaded"),
        ("http://[/a.png", "cannot be downloaded"),
        ("http:///a.png", "is not an http"),
        ("http://a/\ud83d.png", "cannot be downloaded"),
        ("http://127.0.0.1:1/a.png", "All connection attempts failed"),
    ],
)
def test_other_failures_name_the_url(
    server: Server, url: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"image .*{cause}"):
        read_image(url.format(server.url), None, allow_remote=True)


def test_a_cache_that_cannot_be_written_is_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "cache"))
    save_image(tmp_path / "red.png", "red")
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", (tmp_path / "red.png").read_bytes())
    url = f"{server.url}/a.png"
    (tmp_path / "cache" / "images" / f"{hashlib.sha256(url.encode()).hexdigest()}.url" / "a").mkdir(parents=True)
    with pytest.raises(WriteError, match=r"a.png' cannot be kept in .*; set TAILORA_HOME"):
        read_image(url, None, allow_remote=True)


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url)
    with pytest.raises(DataError, match="local network"):
        download_image("http://127.0.0.2/a.png", MIB)
    resolve(monkeypatch, ["127.0.0.1"])
    assert download_image(f"http://images.example:{server.server_port}/a.png", MIB) == CONTENT
    assert server.asked == [(f"images.example:{server.server_port}", "/a.png")]  # a proxy would get the full URL


def test_images_are_downloaded_within_a_running_event_loop(server: Server) -> None:
    async def in_a_notebook() -> bytes:
        return download_image(f"{server.url}/a.png", MIB)

    assert asyncio.run(in_a_notebook()) == CONTENT


def test_remote_images_of_rows_are_read_and_refused_with_their_row(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "cache"))
    save_image(tmp_path / "red.png", "red")
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", (tmp_path / "red.png").read_bytes())
    monkeypatch.setattr(remote_images, "SECONDS", 0.5)
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    urls = [f"{server.url}/a.png", "http://127.0.0.2/a.png", f"{server.url}/slow", f"{server.url}/to=http://10.0.0.1/"]
    urls += urls[2:]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": messages, "image": url}) + "\n" for url in urls))
    processor = tiny_llava()[1]
    with pytest.raises(DataError) as caught:
        prepare(str(data), processor, DataSettings(validation_split=0))
    assert str(caught.value).count("is remote; download it, or use --allow-remote-images") == len(urls)
    assert not server.asked
    with pytest.raises(DataError) as caught:
        prepare(str(data), processor, DataSettings(validation_split=0, allow_remote_images=True))
    shown = [text.partition("rows.jsonl:")[2] for text in str(caught.value).splitlines()[1:]]
    assert [text[:2] for text in shown] == ["2:", "3:", "4:", "5:", "6:"]
    causes = ["local network", "not downloaded within 0.5 seconds", "local network"]
    for text, cause in zip(shown, causes + causes[1:], strict=True):
        assert cause in text
    assert [path for _, path in server.asked] == ["/a.png", "/slow", "/to=http://10.0.0.1/"]  # each only once
    data.write_text(json.dumps({"messages": messages, "image": urls[0]}))
    prepared = prepare(str(data), processor, DataSettings(validation_split=0, allow_remote_images=True))
    assert prepared.train[0].images[0].load().getpixel((0, 0)) == (255, 0, 0)
    assert [path for _, path in server.asked].count("/a.png") == 1  # although the data was read twice
