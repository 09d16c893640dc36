"""An OpenAI-compatible server with a fake judge, in a thread."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tailora.evaluation import judge

KEY = "sk-very-secret"
Reply = Callable[[str, str], str | int]  # answers A and B -> text, or an HTTP status


class Server:
    """Replies as `reply` does; `requests` has the bodies that it got."""

    def __init__(self) -> None:
        self.requests = list[dict[str, Any]]()
        self.reply: Reply = lambda _a, _b: "[[A]]"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                pair = re.findall(r"<answer [AB]>\n(.*?)\n</answer", body["messages"][0]["content"], re.DOTALL)
                reply = server.reply(*pair)
                text = f"unknown key {self.headers['Authorization']}" if isinstance(reply, int) else reply
                with suppress(ConnectionError):  # of a client that has not waited
                    self.send_response(reply if isinstance(reply, int) else 200)
                    self.end_headers()
                    self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def fake_judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TAILORA_JUDGE_KEY", KEY)
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.001)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
