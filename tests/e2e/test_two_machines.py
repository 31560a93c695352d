"""A federation across two network namespaces: the server in one, an owner in the other, a wire between.

Neither side can reach the other's loopback, so nothing but the three public ports can carry the run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from checks import accepted_vectors, check_ledgers, installed_digest
from namespaces import Wire, wires
from shores import Federation, run_config

DOMAINS = ("garden",)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A veth pair between two new namespaces, removed with the test."""
    with wires(1) as (made,):
        yield made


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
