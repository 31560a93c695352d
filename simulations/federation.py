"""A whole federation on this machine: the very processes of a deployment, each in its own home.

`OnOneMachine` makes a server's home, a witness's and an owner's for each domain, starts `isthmus server up`,
`isthmus witness up` and one `isthmus client up` a domain, lets every owner join with a real kit over real
TLS, starts a run and watches it to its end. Nothing is shared between the homes but the wire. The only things
that a deployment could not do are looking into all homes at once, for the progress and for the report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.data.domain import Domain
from clients.home import ClientHome
from clients.join import join
from clients.policy import EgressPolicy
from clients.training.slots import environment
from common.config import RunConfig
from common.errors import FederationError
from common.kit import read_kit
from common.processes import STOP_PATIENCE_S, ProcessSpec, Supervisor, free_ports, listens, python_module
from common.witness.home import WitnessConfig, WitnessHome
from server.cli import create_home, create_run, resolved
from server.home import ServerHome
from server.kit import write_kit
from server.roots import newest_root
from server.runs import Run

PORTS_OF_SERVER = 4
READY_TIMEOUT_S = 90.0


class OnOneMachine:
    """The homes and processes of one simulated federation under `folder`."""

    def __init__(
        self,
        folder: Path,
        data: dict[str, Path],
        *,
        threads_per_domain: int = 1,
        trainers_at_once: int | None = None,
        policy: EgressPolicy | None = None,
    ) -> None:
        """`policy` is every owner's; None: the default one."""
        self.folder = folder.resolve()
        self._slots = trainers_at_once or max(1, (os.cpu_count() or 1) // threads_per_domain)
        self._data = data
        self._threads = threads_per_domain
        self._policy = policy

    @property
    def server_home(self) -> ServerHome:
        """The merge server's home, once it is made."""
        return ServerHome(self.folder / "server")

    def client_path(self, domain: str) -> Path:
        """An owner's home directory."""
        return self.folder / "domains" / domain

    def client_home(self, domain: str) -> ClientHome:
        """An owner's home, once it has joined."""
        return ClientHome(self.client_path(domain))

    @contextmanager
    def running(self, base: str) -> Iterator[Supervisor]:
        """Start (or, after an interruption, start again) server and owners; end them on the way out."""
        home = self._make_server()
        server = ProcessSpec(
            "server",
            python_module("server.cli", "up", "--home", str(home.path)),
            ready=lambda: (home.path / "up").exists(),
        )
        (home.path / "up").unlink(missing_ok=True)
        first = Supervisor(
            self.folder / "launcher", [self._witness(home), server], patience_s=2 * STOP_PATIENCE_S
        )
        first.install_signal_handlers()
        try:
            first.start(READY_TIMEOUT_S)
            for domain in self._data:
                if not first.stopping:
                    self._join(home, domain, base)
            slots = environment(self.folder / "launcher" / "slots", self._slots)
            env = {"OMP_NUM_THREADS": str(self._threads), **slots}
            for domain in self._data:
                argv = python_module("clients.cli", "up", "--home", str(self.client_path(domain)))
                first.add(ProcessSpec(domain, argv, env))
            yield first
        finally:
            first.stop()
            first.restore_signal_handlers()

    def _make_server(self) -> ServerHome:
        path = self.folder / "server"
        if not (path / "server.toml").exists():
            ports = free_ports(PORTS_OF_SERVER)
            names = ("fleet", "exchange", "enrol", "superlink")
            create_home(
                path,
                {
                    "name": "simulation",
                    "hosts": ["127.0.0.1"],
                    "bind": "127.0.0.1",
                    "ports": dict(zip(names, ports, strict=True)),
                },
            )
        return ServerHome(path)

    def _witness(self, home: ServerHome) -> ProcessSpec:
        """A witness of all ledgers; it is a process of its own, but not independent: this machine runs it."""
        path = self.folder / "witness"
        if not (path / "witness.toml").exists():
            config = WitnessConfig(name="witness.simulation", port=free_ports(1)[0])
            WitnessHome.create(path, config, newest_root(home))
        witness = WitnessHome(path)
        witness.card.add_to(home.path)  # so that every join kit has it
        argv = python_module("common.witness.cli", "up", "--home", str(path))
        return ProcessSpec("witness", argv, ready=lambda: listens("127.0.0.1", witness.config.port))

    def _join(self, home: ServerHome, domain: str, base: str) -> None:
        path = self.client_path(domain)
        if (path / "client.toml").exists():
            return
        kit_path = self.folder / "kits" / f"{domain}.kit.json"
        write_kit(home, domain, kit_path)
        join(
            read_kit(kit_path),
            path,
            data=self._data[domain],
            base=base,
            supernode_port=free_ports(1)[0],
            policy=self._policy,
        )

    def start_run(self, config: RunConfig) -> Run:
        """The run that an interruption left open, or a new one."""
        home, kept = self.server_home, resolved(config)
        for run in home.runs.open():
            if run.spec.config == kept:
                return run
        return create_run(home, config)

    def watch(self, run: Run, supervisor: Supervisor, draw: Callable[[], None]) -> None:
        """Poll until the run is over. Raises FederationError when it failed, KeyboardInterrupt on Ctrl-C."""
        while not run.is_final:
            if supervisor.stopping:
                raise KeyboardInterrupt
            supervisor.poll()
            draw()
            time.sleep(0.5)
        draw()
        state = run.state
        if state["state"] != "done":
            raise FederationError(
                f"the run {state['state']}: {state['reason']}", next_step=f"see {run.folder / 'server.log'}"
            )

    def domains(self) -> dict[str, Domain]:
        """Every domain's data; only a simulation may look."""
        return {name: Domain.load(path) for name, path in self._data.items()}
