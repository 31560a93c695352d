"""Flower's SuperLink and SuperExec as the merge server runs them, and the few commands given to them.

The SuperLink listens on loopback with TLS and node authentication; the ServerApp runs in a process of
its own (`--isolation process`), started by Flower's own SuperExec. No tensor ever passes here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

from common.errors import FederationError
from common.flower import RUN_KEY, flower_env
from common.processes import ProcessSpec, listens
from server.home import HOME_VARIABLE, ServerHome

CONNECTION = "isthmus"
COMMAND_TIMEOUT_S = 60


def environment(home: ServerHome) -> dict[str, str]:
    """What every Flower process of this server runs with."""
    env = flower_env(home.path)
    env[HOME_VARIABLE] = str(home.path)
    config = Path(env["FLWR_HOME"]) / "config.toml"
    config.write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{home.config.ports.superlink}"\n'
        f'root-certificates = "{home.keys / "ca.crt"}"\n',
        encoding="utf-8",
    )
    return env


def superlink_spec(home: ServerHome) -> ProcessSpec:
    """The SuperLink; its state file lets it forget no registered node over a restart."""
    port = home.config.ports.superlink
    keys = home.keys
    argv = [
        *_program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(keys / "tls.crt"), "--ssl-keyfile", str(keys / "tls.key")),
        *("--ssl-ca-certfile", str(keys / "ca.crt")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec.secret")),
        *("--database", str(home.path / "flower" / "state.db")),
    ]
    return ProcessSpec("superlink", argv, environment(home), ready=lambda: listens("127.0.0.1", port))


def superexec_spec(home: ServerHome) -> ProcessSpec:
    """Flower's SuperExec: starts one ServerApp process for each Flower run."""
    argv = [
        *_program("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{home.config.ports.superlink}"),
        *("--root-certificates", str(home.keys / "ca.crt")),
        *("--superexec-auth-secret-file", str(home.keys / "superexec.secret")),
    ]
    return ProcessSpec("superexec", argv, environment(home))


def register_node(home: ServerHome, public_key: bytes) -> int:
    """Register a SuperNode's public key (OpenSSH text); returns Flower's node id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.pub"
        path.write_bytes(public_key)
        answer = _flwr(home, "supernode", "register", str(path), CONNECTION)
    return int(answer["node-id"])


def start_flower_run(home: ServerHome, run_id: str) -> str:
    """Start a Flower run that works on our run `run_id`; returns Flower's own run id."""
    answer = _flwr(home, "run", str(fab_folder()), CONNECTION, "-c", f'{RUN_KEY}="{run_id}"')
    return str(answer["run-id"])


def fab_folder() -> Path:
    """The app bundle's source."""
    return Path(str(files("server") / "fab"))


def fab_sha256() -> str:
    """The bundle's identity, which owners put on their allow list. FAB bytes are reproducible."""
    return hashlib.sha256(build_fab_from_disk(fab_folder())).hexdigest()


def _program(name: str) -> list[str]:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FederationError(
            f"{path} is missing", next_step="install Isthmus with its dependencies (make setup)"
        )
    return [sys.executable, str(path)]


def _flwr(home: ServerHome, *arguments: str) -> dict[str, str]:
    command = [*_program("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment(home)},
            cwd=home.path,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        answer = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        answer = {}
    if not answer.get("success"):
        said = answer.get("error-message") or answer.get("message") or "no answer"
        raise FederationError(
            f"flwr {' '.join(arguments[:2])} failed: {said}",
            next_step="is `isthmus server up` running? see its logs",
        )
    return dict(answer)
