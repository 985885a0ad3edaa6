"""A real ComfyUI server on a free loopback port, and a client of its HTTP and websocket interface."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from .cache import CHECKOUT
from .steps import StepError

LEASH = Path(__file__).with_name("leash.py")
PACK = "comfyui-ridfr"  # the pack's folder in custom_nodes
GPU_PROBE = """
import sys, torch
xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
sys.exit(0 if xpu or torch.cuda.is_available() or torch.backends.mps.is_available() else 3)
"""
# OpenMP's threads spin while they wait, by default: on cores that others use too, that made sampling 10 times slower.
CALM_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
# Loopback is never asked of a proxy.
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def device_flags(python: Path) -> list[str]:
    """`--cpu` where torch finds no GPU: ComfyUI does not start there without it."""
    return ["--cpu"] if subprocess.run([python, "-c", GPU_PROBE], capture_output=True).returncode == 3 else []


def link_pack(base: Path, name: str = PACK) -> Path:
    """Make the checkout the pack `name` of the base directory `base`; returns the link."""
    for folder in ("custom_nodes", "input", "output", "models", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / name
    if link.exists() and link.samefile(CHECKOUT):
        return link
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(CHECKOUT, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi  # a junction needs no privilege on Windows, a symbolic link does
        _winapi.CreateJunction(str(CHECKOUT), str(link))
    return link


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """ComfyUI of `tree`, run by `python` on the base directory `base`; a context manager that always stops it.

    It also ends when this process ends without a chance to stop it: killed, or with its terminal closed.
    """

    def __init__(self, python: Path, tree: Path, base: Path, flags: list[str], port: int | None = None):
        self.port, self.base, self.log = port or free_port(), base, base / "server.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self._tree = tree
        self._command = [python, LEASH, "main.py", "--port", self.port, "--base-directory", base, "--disable-api-nodes",
                         "--database-url", "sqlite:///:memory:", *flags]

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, timeout: float = 300) -> None:
        """Start and wait until it answers; StepError with the end of its log when it doesn't."""
        environment = CALM_THREADS | os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        with open(self.log, "wb") as log:
            # A session of its own: Ctrl-C reaches this tool alone, which then stops the server.
            self.process = subprocess.Popen([str(part) for part in self._command], cwd=self._tree, stdout=log,
                                            stderr=subprocess.STDOUT, stdin=subprocess.PIPE, start_new_session=True,
                                            env=environment)
        try:
            self._wait(time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    def _wait(self, deadline: float) -> None:
        while self.alive() and time.monotonic() < deadline:
            try:
                _http.open(f"{self.url}/system_stats", timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
        reason = "it does not answer" if self.alive() else f"it ended with code {self.process.returncode}"
        tail = "\n".join(self.log_text().splitlines()[-15:])
        raise StepError("Starting ComfyUI", f"{reason}. The end of its log:\n{tail}\n", f"The whole log is {self.log}.")

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()

    def log_text(self) -> str:
        """Its log so far, without the colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))


class PromptError(Exception):
    """A prompt that the server refused or that failed; `details` is what the server said."""

    def __init__(self, message: str, details: dict):
        super().__init__(message)
        self.details = details


class Client:
    """One user of a ComfyUI server."""

    def __init__(self, url: str):
        import websocket

        self.url, self.id = url, uuid.uuid4().hex
        self._ended: dict[str, dict] = {}
        # Without a proxy named here, http_no_proxy is not heeded and the environment's proxy is asked.
        self._socket = websocket.create_connection(f"{url.replace('http', 'ws', 1)}/ws?clientId={self.id}",
                                                   http_proxy_host="127.0.0.1", http_no_proxy=["127.0.0.1"])

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def get(self, path: str, **query: str) -> bytes:
        tail = f"?{urllib.parse.urlencode(query)}" if query else ""
        with _http.open(f"{self.url}{path}{tail}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": content_type})
        with _http.open(request, timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict:
        return json.loads(self.get("/object_info"))

    def submit(self, graph: dict) -> str:
        """Queue `graph` (API format) and return its prompt id; PromptError when the server refuses it."""
        body = json.dumps({"prompt": graph, "client_id": self.id}).encode()
        try:
            return json.loads(self.post("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as refusal:
            details = json.loads(refusal.read())
            errors = [details["error"], *(e for node in details["node_errors"].values() for e in node["errors"])]
            raise PromptError("; ".join(f"{e['message']}: {e['details']}" for e in errors), details) from None

    def wait(self, prompt: str, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600) -> dict:
        """Follow `prompt` to its end and return its history entry; PromptError when it fails or is interrupted.

        on_event gets the type and the data of every message about this prompt.
        """
        import websocket

        deadline = time.monotonic() + timeout
        while prompt not in self._ended:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                message = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                raise PromptError(f"it did not end within {timeout:.0f} s", {"prompt_id": prompt}) from None
            except (websocket.WebSocketException, OSError) as error:
                raise PromptError(f"ComfyUI closed the connection ({error})", {"prompt_id": prompt}) from None
            if isinstance(message, bytes):
                continue  # a preview picture
            message = json.loads(message)
            kind, data = message["type"], message.get("data") or {}
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                self._ended[data["prompt_id"]] = {"kind": kind} | data
            if on_event and data.get("prompt_id") == prompt:
                on_event(kind, data)
        end = self._ended.pop(prompt)
        if end["kind"] == "execution_error":
            raise PromptError(f"{end['node_type']}: {end['exception_message'].strip()}", end)
        if end["kind"] == "execution_interrupted":
            raise PromptError("interrupted", end)
        return self.history(prompt)

    def run(self, graph: dict, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600) -> dict:
        return self.wait(self.submit(graph), on_event, timeout)

    def history(self, prompt: str) -> dict:
        """The finished prompt's entry; it is written a moment after the message that it ended."""
        for _ in range(100):
            if entry := json.loads(self.get(f"/history/{prompt}")).get(prompt):
                return entry
            time.sleep(0.05)
        raise PromptError("the server has no history of this prompt", {"prompt_id": prompt})

    def interrupt(self) -> None:
        self.post("/interrupt")

    def image(self, entry: dict) -> bytes:
        """The file of one entry of a node's "images" output."""
        return self.get("/view", filename=entry["filename"], subfolder=entry["subfolder"], type=entry["type"])

    def upload_image(self, name: str, data: bytes) -> str:
        """Put a picture into the server's input folder; returns the name that LoadImage takes."""
        edge = uuid.uuid4().hex
        head = (f'--{edge}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{edge}\r\n'
                f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n")
        body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
        answer = json.loads(self.post("/upload/image", body, f"multipart/form-data; boundary={edge}"))
        return f"{answer['subfolder']}/{answer['name']}".lstrip("/")
