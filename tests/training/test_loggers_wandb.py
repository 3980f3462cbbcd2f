"""W&B without a network: every case runs in a process of its own, as wandb reads its environment once."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import LIMIT_S

from training.loggers import wandb as module
from training.loggers.base import RunInfo
from training.loggers.wandb import WandbConfig, WandbLogger

pytest.importorskip("wandb")

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 3
LEFT_ALONE_S = 90  # for which wandb itself waits for a server

CHILD = """
import json, sys, time
from pathlib import Path
from training.loggers import Loggers, RunInfo, WandbConfig
from training.loggers import wandb as module
from training.loggers.wandb import WandbLogger

module.PROBE_SECONDS = float(sys.argv[3])

folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
lines = []
loggers = Loggers([WandbLogger(WandbConfig(**config), lines.append)], lines.append)
begin = time.monotonic()
loggers.start(RunInfo("tiny", folder, {"model": {"width": 64}}, {"parameters": 7}))
seconds = time.monotonic() - begin
for step, loss in ((1, 3.5), (2, 3.25)):
    loggers.log(step, 100 * step, {"train/loss": loss})
loggers.log(2, 200, {"val/loss": 3.0, "val/bits_per_byte": float("nan")})
if config.get("mode") == "offline":
    loggers.sample(2, 200, "once <b>upon</b>")
loggers.finish("interrupted")
print(json.dumps({"lines": lines, "seconds": seconds}))
"""


def record_run(folder: Path, environment: dict[str, str], probe: float = LIMIT_S, **config: Any) -> dict[str, Any]:
    """Run CHILD with a closed stdin, an empty home and no wandb variable but the given ones; a server has `probe`
    seconds to answer."""
    run, home = folder / "run", folder / "home"
    run.mkdir()
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**clean, "HOME": str(home), "NETRC": str(home / ".netrc"), "PYTHONPATH": str(ROOT), **environment}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(run), json.dumps(config), str(probe)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    *noise, result = child.stdout.splitlines()
    assert noise == [], "wandb printed something of its own"
    assert child.stderr == "", "wandb printed something of its own"
    return json.loads(result)


def records(run: Path) -> list[Any]:
    """What a .wandb file holds: protobuf records in LevelDB's log format (32 KiB blocks of checksummed pieces)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, at, piece, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a header never straddles blocks
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        piece += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            found.append(Record.FromString(piece))
            piece = b""
    return found


def test_offline_run_holds_config_metrics_axes_and_sample(tmp_path: Path) -> None:
    result = record_run(tmp_path, {}, mode="offline", project="p", group="g", tags=["t"], notes="n")
    (line,) = result["lines"]
    assert line.startswith("wandb      offline (logger.wandb.mode=offline); to upload later: wandb sync ")
    assert Path(line.rsplit(" ", 1)[1]).parent == tmp_path / "run" / "wandb"

    found = records(tmp_path / "run")
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group, list(run.tags), run.notes) == ("p", "tiny", "g", ["t"], "n")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"width": 64}
    assert config["facts"] == {"parameters": 7}

    history = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history.append({name: json.loads(value) for name, value in row.items() if not name.startswith("_")})
    assert history[:2] == [
        {"step": 1, "tokens": 100, "train/loss": 3.5},
        {"step": 2, "tokens": 200, "train/loss": 3.25},
    ]
    assert history[2]["val/loss"] == 3.0
    assert history[3]["sample/_type"] == "html-file"

    metrics = {
        record.metric.name or record.metric.glob_name: record.metric
        for record in found
        if record.metric.name or record.metric.glob_name
    }
    assert {"tokens", "*", "val/loss", "val/bits_per_byte"} <= set(metrics)
    assert metrics["*"].step_metric == metrics["val/loss"].step_metric == "step"
    assert metrics["val/loss"].summary.min
    (end,) = [record.exit for record in found if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 130


def test_without_a_login_the_run_is_offline_and_nothing_is_asked(tmp_path: Path) -> None:
    result = record_run(tmp_path, {})
    (line,) = result["lines"]
    assert line.startswith("wandb      offline (not logged in: run `wandb login` or set WANDB_API_KEY); to upload")
    assert result["seconds"] < LEFT_ALONE_S
    assert records(tmp_path / "run")


@pytest.mark.parametrize(
    ("asked", "own", "logged_in", "chosen"),
    [
        ("auto", "online", True, "online"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "disabled", True, "disabled"),
        ("online", "offline", True, "online"),  # what the command line says beats the environment
        ("online", "online", False, "offline"),
        ("offline", "online", True, "offline"),
    ],
)
def test_the_mode_follows_the_config_then_wandbs_own_settings_then_the_login(
    asked: str, own: str, logged_in: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_answers", lambda url: True)
    monkeypatch.setattr(module, "login_problem", lambda *arguments: "" if logged_in else "not logged in")
    settings = SimpleNamespace(mode=own, base_url="http://server")
    mode, why = module._choose_mode(None, asked, settings)
    assert mode == chosen
    assert why or mode == "online"


def test_wandb_mode_is_respected(tmp_path: Path) -> None:
    assert record_run(tmp_path, {"WANDB_MODE": "disabled"})["lines"] == ["wandb      wandb's own settings say disabled"]
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("value", ["true", "1"])
def test_wandb_disabled_is_respected_unless_the_config_says_otherwise(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DISABLED", value)
    settings = SimpleNamespace(mode="online", base_url="http://server")
    assert module._choose_mode(None, "auto", settings) == ("disabled", "WANDB_DISABLED is set")
    assert module._choose_mode(None, "offline", settings)[0] == "offline"


def test_wandb_name_is_the_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    names: list[str] = []
    run = SimpleNamespace(step=0, url="https://wandb.example", define_metric=lambda *arguments, **options: None)
    monkeypatch.setattr(module, "_choose_mode", lambda *arguments: ("online", ""))
    monkeypatch.setattr(wandb, "init", lambda *, name, **options: names.append(name) or run)
    for value in ("", "mine"):
        monkeypatch.setenv("WANDB_NAME", value)
        WandbLogger(WandbConfig(), lambda line: None).start(RunInfo("tiny", tmp_path, {}, {}))
    assert names == ["tiny", "mine"]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("server", ["refuses", pytest.param("silent", marks=pytest.mark.slow)])
def test_without_a_network_the_run_is_offline_within_seconds_and_the_key_is_nowhere(
    server: str, silent_port: int, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{9 if server == 'refuses' else silent_port}"
    server_at = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
    result = record_run(tmp_path, server_at, probe=module.PROBE_SECONDS)
    (line,) = result["lines"]
    assert line.startswith(f"wandb      offline (no answer from {url} within 3 s); to upload later: wandb sync ")
    assert result["seconds"] < LEFT_ALONE_S, "about 2 s when refused, 5 s when silent"

    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


# ---- online, against a stand-in server that speaks just enough of the protocol


@pytest.fixture
def graphql() -> Iterator[tuple[str, list[str]]]:
    """(url, bodies of all requests) of a server that accepts every run."""
    bodies: list[str] = []
    project = {"id": "P", "name": "flash-gpt", "entity": {"id": "E", "name": "me"}}
    bucket = {"id": "B", "name": "abc", "displayName": "tiny", "description": "", "config": "{}", "project": project}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode("utf-8", "replace")
            bodies.append(self.path + " " + body)
            data: dict[str, Any] = {}
            if "upsertBucket" in body:
                data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            elif "createRunFiles" in body:
                data = {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_GET

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    server.server_close()


def test_with_a_key_and_a_server_the_run_is_online(graphql: tuple[str, list[str]], tmp_path: Path) -> None:
    url, bodies = graphql
    server_at = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "NO_PROXY": "127.0.0.1"}
    result = record_run(tmp_path, server_at, init_timeout=LIMIT_S)
    assert result["lines"] == [f"wandb      {url}/me/flash-gpt/runs/abc"]
    assert any("file_stream" in body and "train/loss" in body for body in bodies)


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """A server that answers, and takes no key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_online_run_that_the_server_refuses_is_recorded_offline(refusing_server: str, tmp_path: Path) -> None:
    server_at = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": refusing_server, "NO_PROXY": "127.0.0.1"}
    result = record_run(tmp_path, server_at, init_timeout=LIMIT_S)
    (line,) = result["lines"]
    assert line.startswith(f"wandb      offline ({refusing_server} did not accept the run, CommError: ")
    assert "); to upload later: wandb sync " in line
    assert result["seconds"] < LEFT_ALONE_S, "about 2 s"
    assert any(record.WhichOneof("record_type") == "history" for record in records(tmp_path / "run"))


# ---- the upload at the end


class StuckRun:
    dir = "/somewhere/wandb/run-1/files"

    def __init__(self, error: Exception | None) -> None:
        self.summary: dict[str, str] = {}
        self.error = error

    def finish(self, exit_code: int) -> None:
        if self.error:
            raise self.error
        threading.Event().wait(60)


@pytest.mark.parametrize("error", [None, TimeoutError("Timed out finishing run.")])
def test_finish_is_cut_with_one_line_when_the_upload_hangs(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(module, "FINISH_GRACE_SECONDS", 0.1)
    lines: list[str] = []
    logger = WandbLogger(WandbConfig(), lines.append)
    logger._run = StuckRun(error)
    logger.finish("finished")
    assert lines == ["wandb      upload cut after 0 s; to upload the rest: wandb sync /somewhere/wandb/run-1"]


def test_a_resumed_run_has_the_same_id_and_sends_no_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    sent: list[tuple[int, float]] = []
    ids: list[tuple[str, str]] = []

    class Run:
        """W&B's server as far as rows go."""

        dir, url = str(tmp_path), "https://wandb.example"

        @property
        def step(self) -> int:
            return len(sent)

        def define_metric(self, *arguments: Any, **options: Any) -> None: ...

        def log(self, row: dict[str, float], step: int) -> None:
            assert step == len(sent), "W&B drops a row whose number does not grow"
            sent.append((int(row["step"]), row["loss"]))

    def init(*, id: str, resume: str, **options: Any) -> Run:
        ids.append((id, resume))
        return Run()

    monkeypatch.setattr(module, "_choose_mode", lambda *arguments: ("online", ""))
    monkeypatch.setattr(wandb, "init", init)
    for begin, end, events in ((1, 6, 0), (4, 9, 3)):  # killed after step 6, resumed from the checkpoint of step 3
        logger = WandbLogger(WandbConfig(), lambda line: None)
        logger.start(RunInfo("tiny", tmp_path, {}, {}, step=events, events=events))
        for step in range(begin, end + 1):
            logger.log(step, step, {"loss": 1 / step})
    assert sent == [(step, 1 / step) for step in range(1, 10)]
    assert ids[0] == ids[1]
    assert ids[0][1] == "allow"
