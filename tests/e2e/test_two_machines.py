"""A federation across two network namespaces: the server in one, an owner in the other, a wire between.

Neither side can reach the other's loopback, so nothing but the three public ports can carry the run.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from checks import accepted_vectors, check_ledgers, installed_digest
from shores import Federation, run_config

DOMAINS = ("garden",)


@dataclass(frozen=True)
class Wire:
    """Two namespaces and the address of each end."""

    server: str
    owner: str
    server_address: str = "10.213.7.1"
    owner_address: str = "10.213.7.2"


def _ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    if check and done.returncode != 0:
        raise OSError(done.stderr)
    return done.returncode == 0


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A veth pair between two new namespaces, removed with the test."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    tag = secrets.token_hex(3)
    made = Wire(f"isthmus-s-{tag}", f"isthmus-o-{tag}")
    if not _ip("netns", "add", made.server, check=False):
        pytest.skip("this machine makes no network namespaces")
    try:
        _ip("netns", "add", made.owner)
        near, far = f"is{tag}", f"io{tag}"
        peer = ("peer", "name", far, "netns", made.owner)
        _ip("link", "add", near, "netns", made.server, "type", "veth", *peer)
        for space, link, address in (
            (made.server, near, made.server_address),
            (made.owner, far, made.owner_address),
        ):
            _ip("-n", space, "address", "add", f"{address}/30", "dev", link)
            _ip("-n", space, "link", "set", link, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield made
    finally:
        _ip("netns", "delete", made.server, check=False)
        _ip("netns", "delete", made.owner, check=False)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_server_and_owner_in_two_network_namespaces(federation: Federation, wire: Wire) -> None:
    federation.spaces = {"server": wire.server, "run": wire.server, "client": wire.owner}
    federation.init("--host", wire.server_address, "--bind", wire.server_address)
    server = federation.server_up()
    for name in DOMAINS:
        federation.join(name)
    clients = [federation.client_up(name) for name in DOMAINS]
    run = federation.start_run(run_config(federation.base, merge=[{"method": "task-arithmetic"}]))
    state = federation.finish(run)
    assert state["state"] == "done", state
    assert accepted_vectors(federation, run).keys() == set(DOMAINS)
    check_ledgers(federation, DOMAINS)
    for name in DOMAINS:
        assert installed_digest(federation, name) == federation.summary(run)["published"]["model_digest"]
    assert _cannot_reach(wire, federation.port + 3)
    for process in (*clients, server):
        federation.interrupt(process)
    assert federation.alive() == []


def _cannot_reach(wire: Wire, port: int) -> bool:
    """The SuperLink is not to be had from the owner's machine."""
    code = f"import socket; socket.create_connection(('{wire.server_address}', {port}), timeout=3)"
    command = ["ip", "netns", "exec", wire.owner, "python3", "-c", code]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0
