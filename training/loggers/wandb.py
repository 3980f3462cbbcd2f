"""Weights & Biases' view of a run. It never asks a question and never waits long: without a login or a network the run
is recorded offline in <folder>/wandb, and one line says how to upload it later.
"""

from __future__ import annotations

import html
import inspect
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.loggers.base import Logger, RunInfo, one_line
from training.metrics import METRICS

MODES = ("auto", "online", "offline", "disabled")
PROBE_SECONDS = 3.0
FINISH_SECONDS = 25.0
FINISH_GRACE_SECONDS = 5.0  # for wandb to keep that bound itself, as newer releases do
TEARDOWN_SECONDS = 5.0  # a hundredth of one, in fact
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


@dataclass
class WandbConfig:
    """Raises ValueError on an unknown mode or an init_timeout that is not positive."""

    mode: str = "auto"
    """auto: what WANDB_MODE (or `wandb offline`, `wandb disabled`) says; else online if logged in, else offline."""
    project: str = "flash-gpt"
    entity: str | None = None
    """User or team; null: the account's default."""
    group: str | None = None
    """Puts the runs of one comparison together."""
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    init_timeout: float = 10.0
    """Seconds the server may take to accept the run."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"logger.wandb.mode={self.mode} is unknown: choose one of {', '.join(MODES)}")
        if not self.project.strip():
            raise ValueError("logger.wandb.project is empty; name one, or leave it out (and unset WANDB_PROJECT)")
        if not self.init_timeout > 0:
            raise ValueError(f"logger.wandb.init_timeout={self.init_timeout} must be a positive number of seconds")


class WandbLogger(Logger):
    """Records a run online, or offline if that is asked for or all there is; `notify` gets one line saying where."""

    name = "wandb"

    def __init__(self, config: WandbConfig, notify: Callable[[str], None] = print) -> None:
        self.config = config
        self._notify = notify
        self._run: Any = None  # none: disabled
        self._event = self._first_new = 0

    def start(self, run: RunInfo) -> None:
        # wandb reports its own errors to its server, even from an offline run, and on a dead network its attempts hold
        # up the end of the process by 10 s or more.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")  # in a sweep, a teardown forgets what `setup` was told
        import wandb  # here, because it takes half a second

        settings = wandb.setup(wandb.Settings(silent=True)).settings  # from the environment and wandb's own files
        mode, why = _choose_mode(wandb, self.config.mode, settings)
        if mode == "disabled":
            self._notify(f"wandb      {why}")
            return
        run_id = _run_id(run.folder)
        if mode == "online":
            try:
                self._run = self._init(wandb, run, mode="online", id=run_id, resume="allow")
                self._notify(f"wandb      {self._run.url}")
            except (wandb.Error, OSError) as error:
                mode, why = "offline", f"{settings.base_url} did not accept the run, {one_line(error)}"
                _within(TEARDOWN_SECONDS, wandb.teardown)  # wandb's own process holds the id of the run that it lost
        if mode == "offline":
            self._run = self._init(wandb, run, mode="offline", id=run_id)
            self._notify(f"wandb      offline ({why}); to upload later: wandb sync {Path(self._run.dir).parent}")

        # An event's number is its row. Rows that an interrupted process sent after its last checkpoint are there
        # already, with the values that the resumed run computes again: they are not sent twice.
        self._event, self._first_new = run.events, self._run.step
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="step")
        for metric in METRICS.values():
            if metric.section == "val":  # a run is as good as its best evaluation; of the rest the last value counts
                summary = "min" if metric.better == "lower" else "max"
                self._run.define_metric(metric.name, step_metric="step", summary=summary)

    def log(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        if self._run:
            self._send({"step": step, "tokens": tokens, **metrics})

    def sample(self, step: int, tokens: int, text: str) -> None:
        if self._run:
            import wandb

            page = wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>")
            self._send({"step": step, "tokens": tokens, "sample": page})

    def _send(self, row: dict[str, Any]) -> None:
        if self._event >= self._first_new:
            self._run.log(row, step=self._event)
        self._event += 1

    def finish(self, status: str) -> None:
        if self._run:
            self._run.summary["status"] = status
            try:
                done = _within(
                    FINISH_SECONDS + FINISH_GRACE_SECONDS, lambda: self._run.finish(exit_code=EXIT_CODES[status])
                )
            except TimeoutError:
                done = False
            if not done:
                folder = Path(self._run.dir).parent
                self._notify(
                    f"wandb      upload cut after {FINISH_SECONDS:.0f} s; to upload the rest: wandb sync {folder}"
                )

    def _init(self, wandb: Any, run: RunInfo, **how: Any) -> Any:
        # No source code leaves the machine: git is off because a dirty tree would be uploaded as a patch (the commit
        # is among the facts). No console capture: it would double our log, and its prompts and progress bars are noise.
        settings: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": self.config.init_timeout}
        settings |= {"save_code": False, "disable_code": True, "disable_git": True}
        if "finish_timeout" in wandb.Settings.model_fields:  # newer releases only; bounds wandb's atexit hook too
            settings |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        return wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group,
            tags=self.config.tags or None,
            notes=self.config.notes,
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=str(run.folder),
            config={**run.config, "facts": run.facts},
            settings=wandb.Settings(**settings),
            **how,
        )


def _run_id(folder: Path) -> str:
    """The id of the folder's W&B run: every process that continues it gives the same."""
    file = folder / "wandb" / "run-id"
    if file.exists() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    file.parent.mkdir(exist_ok=True)
    new = secrets.token_hex(4)
    file.write_text(new + "\n", encoding="utf-8")
    return new


def _choose_mode(wandb: Any, asked: str, settings: Any) -> tuple[str, str]:
    """(online, offline or disabled; why), from what the config asks for and wandb's own settings."""
    if asked == "auto" and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "y", "on"):
        return "disabled", "WANDB_DISABLED is set"
    if asked == "auto" and settings.mode in ("disabled", "offline", "dryrun"):
        return ("disabled" if settings.mode == "disabled" else "offline"), f"wandb's own settings say {settings.mode}"
    if asked in ("offline", "disabled"):
        return asked, f"logger.wandb.mode={asked}"
    if problem := login_problem(wandb, settings):
        return "offline", problem
    if not _answers(settings.base_url):
        return "offline", f"no answer from {settings.base_url} within {PROBE_SECONDS:g} s"
    return "online", ""


def login_problem(wandb: Any, settings: Any) -> str:
    """Why wandb has no usable credentials, or "". It looks where it always does: environment, netrc, settings files."""
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            known = wandb.login(prompt=False, verify=False)
        else:  # older releases cannot log in without a prompt, but can look
            known = wandb.api.api_key or settings.identity_token_file
    except wandb.Error as error:  # a malformed key
        return one_line(error)
    return "" if known else "not logged in: run `wandb login` or set WANDB_API_KEY"


def _answers(url: str) -> bool:
    """Whether an HTTP server answers at all: a bare connection would accept a dead port-forward and ignore proxies."""
    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
            answered.append(True)
        except urllib.error.HTTPError:  # 404 is an answer
            answered.append(True)
        except (OSError, ValueError):
            pass

    # The socket's timeout does not cover the name look-up, so the whole question has one too.
    return _within(PROBE_SECONDS, ask) and bool(answered)


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` came back in time; if not, it is left behind in a daemon thread. Its exception is raised here."""
    errors: list[Exception] = []

    def target() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()
