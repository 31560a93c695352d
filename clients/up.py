"""`isthmus client up`: the SuperNode and the owner runner, kept alive until Ctrl-C."""

from __future__ import annotations

import sys
from pathlib import Path

from clients.home import ClientHome
from common.errors import ConfigError
from common.flower import flower_env
from common.processes import ProcessSpec, Supervisor, check_port_free, listens, python_module


def specs(home: ClientHome) -> list[ProcessSpec]:
    """The two processes of an owner."""
    env = flower_env(home.path)
    port = home.config.supernode_port
    supernode = [
        *(sys.executable, str(Path(sys.executable).parent / "flower-supernode")),
        *("--superlink", home.config.server.fleet),
        *("--root-certificates", str(home.keys / "ca.crt")),
        *("--auth-supernode-private-key", str(home.keys / "flower.key")),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(home.keys / "superexec.secret")),
        *("--node-config", f'domain="{home.config.domain}"'),
    ]
    return [
        ProcessSpec("supernode", supernode, env, ready=lambda: listens("127.0.0.1", port)),
        ProcessSpec("runner", python_module("clients.runner", str(home.path)), env),
    ]


def up(home: ClientHome) -> None:
    """Run until told to stop.

    Raises ConfigError when a rotation is half done, FederationError when the port is taken or a process does
    not start.
    """
    if home.journal.get("rotation") == {"accepted": True}:
        raise ConfigError("the new keys are not in their place yet", next_step="isthmus client rotate")
    check_port_free("127.0.0.1", home.config.supernode_port, "the SuperNode (supernode_port in client.toml)")
    supervisor = Supervisor(home.path, specs(home))
    supervisor.install_signal_handlers()
    try:
        supervisor.start()
        supervisor.run()
    finally:
        supervisor.stop()
