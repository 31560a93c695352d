"""`isthmus client up`: wire gate, SuperNode and owner runner, kept alive until Ctrl-C."""

from __future__ import annotations

import sys
from pathlib import Path

from clients.home import ClientHome
from clients.wire_gate import HOST, certificates
from common.errors import ConfigError
from common.flower import flower_env
from common.processes import ProcessSpec, Supervisor, check_port_free, free_ports, listens, python_module


def specs(home: ClientHome, wire_port: int) -> list[ProcessSpec]:
    """The three processes of an owner. The SuperNode knows the wire gate's address and no other."""
    env = flower_env(home.path)
    port = home.config.supernode_port
    supernode = [
        *(sys.executable, str(Path(sys.executable).parent / "flower-supernode")),
        *("--superlink", f"{HOST}:{wire_port}"),
        *("--root-certificates", str(home.keys / "wire" / "ca.crt")),
        *("--auth-supernode-private-key", str(home.keys / "flower.key")),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(home.keys / "superexec.secret")),
        *("--node-config", f'domain="{home.config.domain}"'),
    ]
    gate = python_module("clients.wire_gate", str(home.path), str(wire_port))
    direct = {**env, "NO_PROXY": HOST, "no_proxy": HOST}
    return [
        ProcessSpec("wire-gate", gate, env, ready=lambda: listens(HOST, wire_port)),
        ProcessSpec("supernode", supernode, direct, ready=lambda: listens("127.0.0.1", port)),
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
    wire_port = home.config.wire_port or free_ports(1)[0]
    check_port_free(HOST, wire_port, "the wire gate (wire_port in client.toml)")
    certificates(home)
    supervisor = Supervisor(home.path, specs(home, wire_port))
    supervisor.install_signal_handlers()
    try:
        supervisor.start()
        supervisor.run()
    finally:
        supervisor.stop()
