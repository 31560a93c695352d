"""The supervisor, with children that cost nothing."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common import processes
from common.errors import FederationError
from common.processes import ProcessSpec, Supervisor, check_port_free, free_ports, last_lines, listens

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def eventually(true: Callable[[], bool], within_s: float = 20.0) -> None:
    until_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def child(name: str, code: str, **options: object) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, "-S", "-c", code], **options)  # type: ignore[arg-type]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path, [], patience_s=1.0)
    yield made
    made.stop()


def pids(supervisor: Supervisor) -> list[int]:
    return [c.process.pid for c in supervisor._children if c.process is not None]


def test_what_crashes_starts_again(supervisor: Supervisor, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    supervisor.add(child("crasher", f"open({str(marks)!r}, 'a').write('x'); raise SystemExit(3)"))

    def three() -> bool:
        for started in supervisor._children:
            started.resume_at_s = 0.0  # do not wait out the growing pause
        supervisor.poll()
        return marks.exists() and len(marks.read_text()) >= 3

    eventually(three)
    assert supervisor._children[0].restarts >= 2


def test_pauses_grow(supervisor: Supervisor) -> None:
    supervisor.add(child("crasher", "raise SystemExit(3)"))
    started, pauses = supervisor._children[0], []
    for _ in range(8):
        if started.process is not None:
            started.process.wait()
        supervisor.poll()
        pauses.append(started.resume_at_s - time.monotonic())
        supervisor._launch(started)
    assert pauses[0] < 1.1
    assert pauses[0] < pauses[2] < pauses[-1] <= processes.MAX_PAUSE_S


def test_what_need_not_restart_does_not(supervisor: Supervisor) -> None:
    supervisor.add(child("once", "pass", restart=False))
    process = supervisor._children[0].process
    assert process is not None
    process.wait()
    supervisor.poll()
    supervisor.poll()
    assert supervisor._children[0].process is process


def test_stop_ends_every_child_and_what_they_started(tmp_path: Path) -> None:
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); time.sleep(60)"
    )
    supervisor = Supervisor(
        tmp_path, [ProcessSpec("calm", SLEEP), child("stubborn", stubborn)], patience_s=0.5
    )
    log = supervisor.log_path("stubborn")
    supervisor.start()
    eventually(lambda: log.exists() and log.read_text().endswith("\n"))
    everyone = [*pids(supervisor), int(log.read_text())]
    started_s = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - started_s < 10
    eventually(lambda: not any(_lives(pid) for pid in everyone))
    assert json.loads((tmp_path / "processes.json").read_text()) == {}  # never polled


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_children_run_in_an_empty_folder_with_their_own_environment(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    code = "import os; print(os.getcwd(), os.environ['MINE'], os.getpgid(0) == os.getpid(), flush=True)"
    supervisor.add(child("asker", code, env={"MINE": "yes"}))
    log = supervisor.log_path("asker")
    eventually(lambda: log.exists() and log.read_text().endswith("\n"))
    assert log.read_text().split() == [str(tmp_path / "empty"), "yes", "True"]


def test_one_that_never_gets_ready_is_named_with_its_last_words(tmp_path: Path) -> None:
    spec = child("broken", "print('no such table'); raise SystemExit(1)", ready=lambda: False)
    supervisor = Supervisor(tmp_path, [ProcessSpec("calm", SLEEP), spec], patience_s=0.5)
    try:
        with pytest.raises(FederationError, match=r"broken did not start: no such table") as caught:
            supervisor.start()
        assert "broken.log" in caught.value.next_step
    finally:
        supervisor.stop()
    assert not any(_lives(pid) for pid in pids(supervisor))


def test_one_that_takes_too_long_is_named_too(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, [ProcessSpec("slow", SLEEP, ready=lambda: False)], patience_s=0.5)
    try:
        with pytest.raises(FederationError, match=r"slow did not start: \(its log is empty\)"):
            supervisor.start(timeout_s=0.2)
    finally:
        supervisor.stop()


def test_a_signal_asks_for_the_stop(supervisor: Supervisor) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        supervisor.install_signal_handlers()
        assert not supervisor.stopping
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: supervisor.stopping)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_port_in_use_is_named_with_what_wanted_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert listens("127.0.0.1", port)
        with pytest.raises(FederationError, match=rf"port {port} on 127.0.0.1, wanted by the Exchange"):
            check_port_free("127.0.0.1", port, "the Exchange")
    check_port_free("127.0.0.1", port, "the Exchange")
    assert not listens("127.0.0.1", port)


def test_free_ports_differ_and_no_connection_is_given_one() -> None:
    found = free_ports(200)
    assert len(set(found)) == 200
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists() and int(given.read_text().split()[0]) >= 32_768:  # Linux's own
        assert max(found) < int(given.read_text().split()[0])


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_ports(1)[0]))
        port = taken.getsockname()[1]
        monkeypatch.setattr(processes, "FIRST_PORT", port - 1)
        monkeypatch.setattr(processes, "LAST_PORT", port + 1)
        assert set(free_ports(1)) <= {port - 1, port + 1}


def test_last_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none") == "(no log)"
    (tmp_path / "log").write_text("a\nb\nc\nd\n")
    assert last_lines(tmp_path / "log", 2) == "c | d"


def test_usage_is_kept_by_name(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.add(ProcessSpec("calm", SLEEP))

    def peak_bytes() -> int:
        supervisor.poll()
        table = json.loads((tmp_path / "processes.json").read_text())
        assert table["calm"]["cpu_s"] >= 0
        return int(table["calm"]["peak_memory_bytes"])

    eventually(lambda: peak_bytes() > 1 << 20)


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    supervisor = Supervisor(tmp_path, [])
    supervisor.install_signal_handlers()
    supervisor.install_signal_handlers()
    signal.raise_signal(signal.SIGTERM)
    assert supervisor.stopping
    supervisor.restore_signal_handlers()
    assert {number: signal.getsignal(number) for number in before} == before
