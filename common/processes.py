"""Start, watch and end the processes that one command is made of.

Rules: every child runs in a neutral empty directory and its own process group; it dies with its
supervisor (on Linux even after kill -9, by the kernel's parent-death signal); what crashes is started
again with a growing pause; logs go to one file a process; peak memory is sampled and kept.
Children are started from the main thread only, because the parent-death signal follows the thread.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from common.errors import FederationError
from common.lifetime import die_with_parent

MAX_PAUSE_S = 20.0
STOP_PATIENCE_S = 8.0
FIRST_PORT, LAST_PORT = 20_000, 32_767
MEASURE_EVERY_S = 2.0  # each look reads every process of the machine


@dataclass(frozen=True)
class ProcessSpec:
    """One child: its name in logs and tables, its command, and whether a crash starts it again."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    restart: bool = True
    ready: Callable[[], bool] | None = None


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with this interpreter and never imports from the directory it is in."""
    return [sys.executable, "-P", "-m", module, *arguments]


def spawn(
    argv: Sequence[str], *, folder: Path, log: Path | None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `argv` in the neutral directory `folder` (created, kept empty), output appended to `log`."""
    folder.mkdir(parents=True, exist_ok=True)
    full_env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **(env or {})}  # spinning starves the neighbours
    full_env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{full_env.get('PATH', '')}"
    output: IO[bytes] | int = subprocess.DEVNULL
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    try:
        return subprocess.Popen(
            list(argv),
            cwd=folder,
            env=full_env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
    finally:
        if not isinstance(output, int):
            output.close()


def end(process: subprocess.Popen[bytes], patience_s: float = STOP_PATIENCE_S) -> None:
    """SIGTERM to the whole group, then SIGKILL to what is left of it."""
    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(pid: int, what: signal.Signals) -> None:
    try:
        os.killpg(pid, what)
    except (ProcessLookupError, PermissionError):
        return


def check_port_free(host: str, port: int, what: str) -> None:
    """Raise FederationError when `port` is taken, naming what wanted it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise FederationError(
                f"port {port} on {host}, wanted by {what}, is in use",
                next_step="end the program that listens there, or choose another port",
            ) from None


def free_ports(count: int) -> list[int]:
    """`count` different ports on 127.0.0.1 that were free a moment ago.

    They lie below those that Linux gives to outgoing connections, one of which could otherwise take a port
    before the process that is meant to listen there has started.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


@dataclass
class _Child:
    spec: ProcessSpec
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts: int = 0
    resume_at_s: float = 0.0


class Supervisor:
    """Keeps a set of processes alive until told to stop. Not thread-safe: one owner, the main thread."""

    def __init__(
        self, folder: Path, specs: Sequence[ProcessSpec], *, patience_s: float = STOP_PATIENCE_S
    ) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._neutral = folder / "empty"
        self._children = [_Child(spec) for spec in specs]
        self._usage = UsageTable(folder / "processes.json")
        self._measure_at_s = 0.0
        self.stopping = False
        self._handlers: dict[signal.Signals, Any] = {}

    def log_path(self, name: str) -> Path:
        """Where the child called `name` writes what it prints."""
        return self._folder / "logs" / f"{name}.log"

    def start(self, timeout_s: float = 60.0) -> None:
        """Start every child in order; a child with `ready` is waited for. Raises FederationError."""
        for child in self._children:
            self._launch(child)
            if child.spec.ready is not None:
                self._await_ready(child, timeout_s)

    def add(self, spec: ProcessSpec) -> None:
        """Start one more child."""
        child = _Child(spec)
        self._children.append(child)
        self._launch(child)

    def poll(self) -> None:
        """Restart what died, sample memory now and then. Call it about once a second."""
        measuring = time.monotonic() >= self._measure_at_s
        if measuring:
            self._measure_at_s = time.monotonic() + MEASURE_EVERY_S
        for child in self._children:
            process = child.process
            if process is None:
                if time.monotonic() >= child.resume_at_s:
                    self._launch(child)
                continue
            if process.poll() is None:
                if measuring:
                    self._usage.sample(child.spec.name, process.pid)
                continue
            _signal_group(process.pid, signal.SIGKILL)  # whatever the dead leader left behind
            if not child.spec.restart:
                continue
            lived_s = time.monotonic() - child.started_s
            child.restarts = 0 if lived_s > 120 else child.restarts + 1
            child.resume_at_s = time.monotonic() + min(MAX_PAUSE_S, 0.5 * 2.0**child.restarts)
            child.process = None
        if measuring:
            self._usage.write()

    def run(self) -> None:
        """Poll until SIGINT or SIGTERM, then end everything."""
        self.install_signal_handlers()
        try:
            while not self.stopping:
                self.poll()
                time.sleep(0.5)
        finally:
            self.stop()

    def install_signal_handlers(self) -> None:
        """SIGINT and SIGTERM ask for an orderly stop."""

        def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
            self.stopping = True

        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, ask_to_stop)
            self._handlers.setdefault(number, before)

    def restore_signal_handlers(self) -> None:
        """Give SIGINT and SIGTERM back to whoever had them before `install_signal_handlers`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def stop(self) -> None:
        """End every child, newest first; all get SIGTERM at once so that the waits overlap."""
        self.stopping = True
        alive = [child.process for child in reversed(self._children) if child.process is not None]
        for process in alive:
            _signal_group(process.pid, signal.SIGTERM)
        deadline_s = time.monotonic() + self._patience_s
        for process in alive:
            end(process, patience_s=max(0.1, deadline_s - time.monotonic()))
        self._usage.write()

    def _launch(self, child: _Child) -> None:
        spec = child.spec
        child.process = spawn(spec.argv, folder=self._neutral, log=self.log_path(spec.name), env=spec.env)
        child.started_s = time.monotonic()

    def _await_ready(self, child: _Child, timeout_s: float) -> None:
        assert child.spec.ready is not None and child.process is not None  # noqa: S101 - by the caller
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not self.stopping:
            if child.spec.ready():
                return
            if child.process.poll() is not None:
                break
            time.sleep(0.05)
        if self.stopping:
            return
        log = self.log_path(child.spec.name)
        raise FederationError(
            f"{child.spec.name} did not start: {last_lines(log)}", next_step=f"see its log, {log}"
        )


def last_lines(log: Path, count: int = 3) -> str:
    """The last lines of a log, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "(no log)"
    return " | ".join(lines[-count:]) or "(its log is empty)"


class UsageTable:
    """Peak resident memory and processor seconds by process name, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peak_bytes: dict[str, int] = {}
        self._cpu_s: dict[tuple[str, int], float] = {}

    def sample(self, name: str, pid: int) -> None:
        """Look at `pid` and, as `name/child`, at everything that it started."""
        try:
            leader = psutil.Process(pid)
            self._note(name, leader)
            for child in leader.children(recursive=True):
                self._note(f"{name}/{_short_name(child)}", child)
        except psutil.Error:
            return

    def _note(self, name: str, process: psutil.Process) -> None:
        try:
            with process.oneshot():
                self._peak_bytes[name] = max(self._peak_bytes.get(name, 0), process.memory_info().rss)
                times = process.cpu_times()
                self._cpu_s[name, process.pid] = times.user + times.system
        except psutil.Error:
            return

    def write(self) -> None:
        """Replace the file with what is known now."""
        table = {
            name: {
                "peak_memory_bytes": peak,
                "cpu_s": round(sum(s for (n, _), s in self._cpu_s.items() if n == name), 1),
            }
            for name, peak in sorted(self._peak_bytes.items())
        }
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
        temporary.replace(self._path)


def _short_name(process: psutil.Process) -> str:
    arguments: list[str] = process.cmdline()
    if "-m" in arguments:
        return arguments[arguments.index("-m") + 1].split(".")[-1]
    for argument in arguments:
        if "flwr-" in argument:
            return Path(argument).name
    return str(process.name())
