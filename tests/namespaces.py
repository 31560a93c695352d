"""Network namespaces joined by a cable, each end a machine of its own; need root and iproute2."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

CLONE_NEWNET = 0x40000000
T = TypeVar("T")


@dataclass(frozen=True)
class Wire:
    """Two namespaces, the address of each end, and the link's name in the server's."""

    server: str
    owner: str
    server_address: str
    owner_address: str
    link: str


def ip(*arguments: str, check: bool = True) -> bool:
    """`ip ARGUMENTS`; whether it succeeded. Raises OSError if it must and did not."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    if check and done.returncode != 0:
        raise OSError(done.stderr)
    return done.returncode == 0


@contextlib.contextmanager
def wires(owners: int) -> Iterator[list[Wire]]:
    """One server's namespace with a veth pair to each of `owners` others; all removed at the end.

    Skips the test where that cannot be. No end has an IPv6 address: nothing is said on the link unasked.
    """
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    tag = secrets.token_hex(3)
    server = f"isthmus-s-{tag}"
    if not ip("netns", "add", server, check=False):
        pytest.skip("this machine makes no network namespaces")
    made = [
        Wire(server, f"isthmus-o{n}-{tag}", f"10.213.{n}.1", f"10.213.{n}.2", f"is{n}{tag}")
        for n in range(owners)
    ]
    try:
        ip("-n", server, "link", "set", "lo", "up")
        for wire in made:
            ip("netns", "add", wire.owner)
            ip("-n", wire.owner, "link", "set", "lo", "up")
            far = f"io{wire.link[2:]}"
            peer = ("peer", "name", far, "netns", wire.owner)
            ip("link", "add", wire.link, "netns", server, "type", "veth", *peer)
            for space, link, address in (
                (server, wire.link, wire.server_address),
                (wire.owner, far, wire.owner_address),
            ):
                ip("-n", space, "link", "set", link, "addrgenmode", "none")
                ip("-n", space, "address", "add", f"{address}/30", "dev", link)
                ip("-n", space, "link", "set", link, "up")
        yield made
    finally:
        for space in (server, *(wire.owner for wire in made)):
            ip("netns", "delete", space, check=False)


def inside(space: str, make: Callable[[], T]) -> T:
    """What `make` returns when it is called in a namespace; a socket stays in the one it was made in."""
    found: list[T] = []

    def enter() -> None:
        descriptor = os.open(Path("/run/netns") / space, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {space}")
        finally:
            os.close(descriptor)
        found.append(make())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return found[0]


def tcp_socket(space: str) -> socket.socket:
    """A TCP socket in `space`; of this process's own network when that is empty."""
    return inside(space, socket.socket) if space else socket.socket()
