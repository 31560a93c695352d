"""`isthmus server up`: the server's processes, and the keeper that sees every open run to its end.

SuperLink, SuperExec, the Fleet proxy and the Exchange are children of this process. A run that nobody
works on (just created, or its ServerApp was killed) gets a new Flower run; a run that keeps dying is
given up as failed, with the folder of its log named.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from common.errors import FederationError
from common.files import write_atomic
from common.processes import ProcessSpec, Supervisor, check_port_free, listens, python_module
from server.home import ServerHome
from server.runs import FAILED, Run
from server.superlink import environment, start_flower_run, superexec_spec, superlink_spec

log = logging.getLogger(__name__)
START_GRACE_S = 45.0
MAX_STARTS = 6
POLL_S = 0.5


def specs(home: ServerHome) -> list[ProcessSpec]:
    """The server's four processes."""
    env = environment(home)
    ports, bind = home.config.ports, home.config.bind
    here = "127.0.0.1" if bind == "0.0.0.0" else bind  # noqa: S104 - compared, not bound
    return [
        superlink_spec(home),
        superexec_spec(home),
        ProcessSpec(
            "fleet-proxy",
            python_module("server.cli", "serve-fleet", str(home.path)),
            env,
            ready=lambda: listens(here, ports.fleet),
        ),
        ProcessSpec(
            "exchange",
            python_module("server.cli", "serve-exchange", str(home.path)),
            env,
            ready=lambda: listens(here, ports.exchange) and listens(here, ports.enrol),
        ),
    ]


def up(home: ServerHome) -> None:
    """Run until told to stop. Raises FederationError when a port is taken or a process does not start."""
    ports, bind = home.config.ports, home.config.bind
    check_port_free("127.0.0.1", ports.superlink, "the SuperLink (ports.superlink in server.toml)")
    check_port_free(bind, ports.fleet, "the Fleet proxy (ports.fleet in server.toml)")
    check_port_free(bind, ports.exchange, "the Exchange (ports.exchange in server.toml)")
    check_port_free(bind, ports.enrol, "enrolment (ports.enrol in server.toml)")
    supervisor = Supervisor(home.path, specs(home))
    supervisor.install_signal_handlers()
    keeper = Keeper(home)
    marker = home.path / "up"
    try:
        supervisor.start()
        write_atomic(marker, b"")
        while not supervisor.stopping:
            supervisor.poll()
            if not supervisor.stopping:
                keeper.look()
            time.sleep(POLL_S)
    finally:
        marker.unlink(missing_ok=True)
        supervisor.stop()


class Keeper:
    """Gives every open run a Flower run to live in, one run at a time."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._started_s: dict[str, float] = {}
        self._starts: Counter[str] = Counter()
        self._seen_working: set[str] = set()

    def look(self) -> None:
        """Start the oldest open run unless somebody works on it or is about to."""
        for run in self._home.runs.open():
            name = run.folder.name
            if run.is_worked_on:
                self._started_s[name] = time.monotonic()
                self._seen_working.add(name)
                return
            waited_s = time.monotonic() - self._started_s.get(name, float("-inf"))
            died = name in self._seen_working  # since it was last started; a new process needs its time
            if waited_s < (2.0 if died else START_GRACE_S):
                return
            self._start(run)
            return

    def _start(self, run: Run) -> None:
        name = run.folder.name
        if self._starts[name] >= MAX_STARTS:
            run.set_state(
                FAILED, reason=f"its process died {MAX_STARTS} times; see {run.folder / 'server.log'}"
            )
            return
        try:
            flower_run = start_flower_run(self._home, name)
        except FederationError as err:
            log.warning("%s", err)  # the SuperLink is coming back: the next look tries again
            return
        self._starts[name] += 1
        self._seen_working.discard(name)
        self._started_s[name] = time.monotonic()
        log.info("run %s works as Flower run %s", name, flower_run)
