"""A federation for end-to-end tests: real processes on loopback, started by the `isthmus` command alone.

`Federation` makes one server's home and some owners' homes in a temporary folder and types what an
operator and owners would type. Every process that it starts, and all that those start, carry a mark in
their environment: so `alive` finds them all, also those whose parent is gone, and `close` ends these
and no others.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from clients.data.domain import Domain
from common.ledger import Ledger

ISTHMUS = Path(sys.executable).with_name("isthmus")
MARK = "ISTHMUS_E2E_MARK"
USERS = 60  # at least the 50 that the egress policy wants behind a metric
PATIENCE_S = 180.0  # for what takes some seconds on an idle machine
RUN_S = 420.0  # for a whole run, which takes half a minute on an idle machine
TAIL_LINES = 25


class GaveUpError(AssertionError):
    """What was waited for did not come."""


def until(
    what: str, found: Callable[[], Any], *, patience_s: float = PATIENCE_S, pause_s: float = 0.1
) -> Any:
    """Poll until `found()` is true; returns it. Raises GaveUpError."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        answer = found()
        if answer:
            return answer
        time.sleep(pause_s)
    raise GaveUpError(f"waited {patience_s:.0f} s for {what}")


def free_range(count: int) -> int:
    """The first of `count` ports in a row that are free, below those that the system gives away itself."""
    while True:
        first = 20_000 + secrets.randbelow(12_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def synthetic(name: str, users: int = USERS, seed: int = 0) -> Domain:
    """A small synthetic domain; `name` is one of those that the demo's generator knows."""
    from simulations.synthetic import make_domain

    return make_domain(name, seed).subsample(users, seed)


def run_config(base: Path, *, name: str = "small", **sections: Any) -> dict[str, Any]:
    """A run that takes a second of work in each domain; `sections` replace or extend what is here."""
    config: dict[str, Any] = {
        "publish": "task-arithmetic",
        "run": {"name": name},
        "base": {"model": str(base)},
        "text": {"max_seq_len": 32},
        "training": {
            "batch_size": 32,
            "max_steps": 12,
            "warmup_steps": 2,
            "learning_rate": 3e-3,  # with it, and without dropout, some of 60 users are served right
            "dropout": 0.0,
            "eval_every_steps": 6,
            "checkpoint_every_steps": 3,
            "precision": "fp32",
            "vector_codec": "fp32",
        },
        "learning": {"steps": 5, "precision": "fp32"},
        "merge": [
            {"method": "task-arithmetic"},
            {"method": "mergerec", "options": {"granularity": "layer"}},
        ],
    }
    for section, values in sections.items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    return config


def write_toml(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(data), encoding="utf-8")
    return path


class Federation:
    """One server and its owners under `folder`. Close it, or use it as a context manager."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.server = folder / "server"
        self.neutral = folder / "elsewhere"  # where commands are typed: holds nothing of ours
        self.neutral.mkdir(parents=True)
        self.mark = secrets.token_hex(8)
        self.port = free_range(4)  # the first of the server's four ports
        self.spaces: dict[str, str] = {}  # first word of a command -> network namespace to type it in
        self.program = [str(ISTHMUS)]
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ISTHMUS_")},
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- commands -----------------------------------------------------------------------------------

    def cli(self, *arguments: object, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Type `isthmus ARGUMENTS` and wait; whatever the exit code is."""
        return subprocess.run(
            self._typed(arguments),
            cwd=self.neutral,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )

    def ok(self, *arguments: object, patience_s: float = PATIENCE_S) -> str:
        """As `cli`, for a command that must succeed; returns what it printed."""
        done = self.cli(*arguments, patience_s=patience_s)
        assert done.returncode == 0, (arguments, done.returncode, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    def start(self, log: str, *arguments: object, **env: str) -> subprocess.Popen[bytes]:
        """Start `isthmus ARGUMENTS` in a process group of its own; output goes to `typed/LOG.log`."""
        path = self.folder / "typed" / f"{log}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as output:
            process = subprocess.Popen(
                self._typed(arguments),
                cwd=self.neutral,
                env={**self._environment, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _typed(self, arguments: Sequence[object]) -> list[str]:
        space = self.spaces.get(str(arguments[0]))
        return [*(["ip", "netns", "exec", space] if space else []), *self.program, *map(str, arguments)]

    # --- the two sides ------------------------------------------------------------------------------

    def init(self, *options: str) -> None:
        """`server init`."""
        self.ok(
            "server", "init", "--home", self.server, "--name", "shop-merge", "--port", self.port, *options
        )

    def server_up(self) -> subprocess.Popen[bytes]:
        """`server up`, and wait until it says that it is up."""
        (self.server / "up").unlink(missing_ok=True)
        process = self.start("server-up", "server", "up", "--home", self.server)
        self._until_up(process, "the server to be up", (self.server / "up").exists)
        return process

    def home(self, name: str) -> Path:
        """An owner's home."""
        return self.folder / "homes" / name

    def kit(self, name: str) -> Path:
        """Where the kit of a domain is."""
        return self.folder / "kits" / f"{name}.kit.json"

    def join(
        self,
        name: str,
        domain: Domain | None = None,
        *,
        base: Path | None = None,
        lead: Mapping[str, str] | None = None,
    ) -> None:
        """`server invite` and `client join`; the owner's data are `domain` (None: a synthetic one).

        `lead` has other addresses than the kit's: of `fleet`, `exchange`, `enrol`.
        """
        data = self.folder / "data" / name
        (synthetic(name) if domain is None else domain).save(data)
        self.kit(name).parent.mkdir(exist_ok=True)
        self.ok("server", "invite", name, "--home", self.server, "--out", self.kit(name))
        self.kit(name).write_text(json.dumps({**read_json(self.kit(name)), **(lead or {})}))
        command = (
            *("client", "join", self.kit(name), "--home", self.home(name), "--data", data),
            *("--base", base or self.base, "--port", free_range(1)),
        )
        for _ in range(3):  # the call waits 30 s: too few on a busy machine
            if self.cli(*command).returncode == 0:
                return
        self.ok(*command)

    def client_up(self, name: str) -> subprocess.Popen[bytes]:
        """`client up`, and wait until its runner is ready."""
        before = len(self._runner_starts(name))
        process = self.start(f"client-up-{name}", "client", "up", "--home", self.home(name))
        self._until_up(process, f"{name} to be up", lambda: len(self._runner_starts(name)) > before)
        return process

    def _runner_starts(self, name: str) -> list[str]:
        log = self.home(name) / "logs" / "runner.log"
        return [line for line in _read(log).splitlines() if "is ready" in line or "left behind" in line]

    def _until_up(self, process: subprocess.Popen[bytes], what: str, is_up: Callable[[], Any]) -> None:
        until(what, lambda: process.poll() is not None or is_up())
        assert process.poll() is None, f"ended with {process.returncode} instead: {what}"

    # --- runs ---------------------------------------------------------------------------------------

    def start_run(self, config: Mapping[str, Any]) -> str:
        """`run start` without waiting; returns the run's id."""
        path = write_toml(self.folder / "run.toml", config)
        return self.ok("run", "start", path, "--home", self.server).split()[0]

    def state(self, run: str) -> dict[str, Any]:
        """The run's `state.json`."""
        return read_json(self.server / "runs" / run / "state.json")

    def finish(self, run: str, *, patience_s: float = RUN_S) -> dict[str, Any]:
        """Wait for the run's end; returns its last state."""
        final = ("done", "failed", "stopped")
        until(f"{run} to end", lambda: self.state(run).get("state") in final, patience_s=patience_s)
        return self.state(run)

    def summary(self, run: str) -> dict[str, Any]:
        return read_json(self.server / "runs" / run / "summary.json")

    def status(self, name: str) -> dict[str, Any]:
        """What an owner's processes are doing."""
        return read_json(self.home(name) / "work" / "status.json")

    def server_status(self, run: str) -> dict[str, Any]:
        """What the ServerApp is doing."""
        return read_json(self.server / "runs" / run / "status.json")

    def ledger(self, name: str = "") -> list[dict[str, Any]]:
        """The bodies of an owner's (or the server's) ledger, whose chain is verified by reading it."""
        folder = self.home(name) if name else self.server
        return [entry.body for entry in Ledger(folder / "ledger.jsonl")]

    # --- processes ----------------------------------------------------------------------------------

    def alive(self, *words: str, under: Path | None = None) -> list[psutil.Process]:
        """Our living processes with each of `words` as an argument or its last part, that name `under`."""
        found = []
        for process, arguments, environment in self._ours():
            names = {*arguments, *(Path(argument).name for argument in arguments)}
            about = " ".join([*arguments, *environment.values()])
            if names.issuperset(words) and (under is None or str(under) in about):
                found.append(process)
        return found

    def _ours(self) -> Iterator[tuple[psutil.Process, list[str], dict[str, str]]]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                if environment.get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process, process.cmdline(), environment

    def runner(self, name: str) -> psutil.Process:
        """An owner's runner."""
        return self.alive("clients.runner", str(self.home(name)))[0]

    def trainers(self, name: str) -> list[psutil.Process]:
        """An owner's trainer, if one is at work."""
        return self.alive("clients.training", under=self.home(name))

    def interrupt(self, process: subprocess.Popen[bytes]) -> int:
        """Ctrl-C in the terminal of `process`; returns its exit code."""
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE_S)
        _, left = psutil.wait_procs(tree, timeout=5)
        assert not left, f"still running after Ctrl-C: {left}"
        return code

    def close(self) -> None:
        """End whatever is left of what this federation started."""
        for _ in range(20):
            left = self.alive()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for started in self._started:
                started.poll()
            if not left:
                return
            time.sleep(0.2)

    def tails(self) -> str:
        """The last lines of every log, for a test that failed."""
        logs = [path for path in sorted(self.folder.rglob("*.log")) if path.stat().st_size]
        parts = []
        for path in logs:
            lines = [line for line in _read(path).splitlines() if "httpx INFO" not in line]
            parts.append("\n".join([f"----- {path.relative_to(self.folder)}", *lines[-TAIL_LINES:]]))
        states = [*self.folder.rglob("state.json"), *self.folder.rglob("status.json")]
        parts += [f"----- {path.relative_to(self.folder)}\n{_read(path)[:500]}" for path in sorted(states)]
        return "\n".join(parts)


def kill(*processes: psutil.Process) -> None:
    """kill -9, all at once."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or an empty one while there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
