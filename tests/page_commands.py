"""Runs the `tailora` and `python` lines of a page's shell blocks in forks of one process that has everything imported.

    python tests/page_commands.py FOLDER

A line that a reader types takes seconds for its imports alone, and a fork has them. FOLDER gets the programs `tailora`
and `python` (CLIENT), which the shell and tailora itself find: they hand over their arguments, environment and standard
streams, and end with the exit code of the fork. So pipes, `&`, `kill` and exit codes are those of the real programs.
"""

import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import socketserver
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

CLIENT = """\
#!{python} -ES
import json, os, signal, socket, sys

program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
is_other = arguments and arguments[0].startswith("-") and arguments[0] not in ("-m", "-c", "-", "-P")
if program == "python" and (is_other or "LOCAL_RANK" in os.environ):  # ranks watch the process that started them
    os.execv("{python}", ["{python}", *arguments])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    request = json.dumps([program, arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    answers = server.makefile()
    fork = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(fork, number))
    sys.exit(int(answers.readline() or 1))
"""
ALSO = ("datasets", "matplotlib.pyplot", "scipy.stats", "sklearn.metrics", "transformers.models.llama", "uvicorn")
FEWER = {  # command -> flags that make it short, whatever the page says
    "demo": {"--max-steps": "2"},
    "train": {"--max-steps": "2"},
    "compare": {"--max-steps": "2", "--seeds": "1", "--rate-tries": "1"},
    "search": {"--max-steps": "2", "--seeds": "1", "--trials": "2"},
    "curve": {"--max-steps": "8", "--per-device-train-batch-size": "8", "--num-train-epochs": "1", "--seeds": "2"},
}
GATE_NOT_MET, WORSE = 4, 5  # what a model of random weights does to a gate, and a few steps to the model


class Handler(socketserver.StreamRequestHandler):
    """Runs one command line in a fork, and waits for it; each request has a process of its own for that."""

    def handle(self) -> None:
        size, descriptors, _, _ = socket.recv_fds(self.connection, 4, 3)
        program, arguments, folder, environment = json.loads(self.rfile.read(int.from_bytes(size, "big")))
        if fork := os.fork():
            self.wfile.write(f"{fork}\n".encode())
            ended = os.pidfd_open(fork)
            if ended not in select.select([ended, self.connection], [], [])[0]:  # the program was killed
                os.kill(fork, signal.SIGKILL)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
            expected = [WORSE] + [GATE_NOT_MET] * ("--gate" in arguments)  # the tiny model's results are not the page's
            self.wfile.write(f"{0 if code in expected else code}\n".encode())
            return
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (  # those of the server are pipes
            os.fdopen(number, "w" if number else "r", 1 if number == 2 else -1, closefd=False) for number in range(3)
        )
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(exit_code(["-m", "tailora", *shortened(arguments)] if program == "tailora" else arguments))


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 20

    def handle_error(self, *_: Any) -> NoReturn:
        traceback.print_exc()
        os._exit(1)


def shortened(tokens: list[str]) -> list[str]:
    """Returns a command line of tailora with the flags of FEWER in place of its own."""
    fewer = FEWER.get(tokens[0], {}) if tokens and "--help" not in tokens else {}
    kept = [token for i, token in enumerate(tokens) if token not in fewer and tokens[max(i - 1, 0)] not in fewer]
    return kept + [part for flag_and_value in fewer.items() for part in flag_and_value]


def exit_code(arguments: list[str]) -> int:
    """Does what `python ARGUMENTS` does, and returns its exit code."""
    try:
        interpret(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def interpret(arguments: list[str]) -> None:
    if arguments[:2] == ["-P", "-u"]:  # a child process of tailora, which kills its process group if stdin ends
        os.setsid()
        arguments = arguments[2:]
    first, *rest = arguments or ["-"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        for name in (rest[0], f"{rest[0]}.__main__"):
            sys.modules.pop(name, None) if name != "tailora" else None  # else runpy warns that it was imported before
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        code, *others = rest if first == "-c" else [sys.stdin.read(), *rest]
        sys.argv, sys.path[0] = [first, *others], os.getcwd()
        exec(compile(code, "<stdin>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def main(folder: Path) -> None:
    address = folder / "socket"
    for name in ("tailora", "python"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (folder / name).chmod(0o755)
    sys.executable = str(folder / "python")  # with which tailora starts its other processes
    import tailora

    for module in pkgutil.walk_packages(tailora.__path__, "tailora."):
        importlib.import_module(module.name)
    for name in ALSO:
        importlib.import_module(name)
    with Server(str(address), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
