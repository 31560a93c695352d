"""kill -9 at random moments, hundreds of times: what was acknowledged is in both ledgers exactly once.

A server and two owners, real processes over mutual TLS on loopback, work on while one after the other is
killed and started again. At every fourth start the dead process's ledger also gets part of a line at its end,
as a power cut leaves it (kill -9 alone cannot tear a write of one line).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import socket
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import mortals
import pytest
from crossing import ROOT_KEY, Owner, Shore, make_bundle, make_vector
from typer.testing import CliRunner

from common.audit.cli import app
from common.ledger import Ledger
from common.parcels import SERVER
from common.roots import SignedRoot

KILLS = 210
JOBS = 100_000  # more than there is time for
LAST_JOBS = 5
SEED = 4
TORN = b'{"body":{"channel":"data","digest":"'

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


class Mortal:
    """A process that is killed and started again, and what its ledger said so far."""

    def __init__(self, name: str, ledger: Path, target: Any, arguments: tuple[Any, ...]) -> None:
        self.name, self.ledger = name, ledger
        self._target, self._arguments = target, arguments
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["clients.exchange_client", "server.exchange", "numpy"])
        self.said: list[str] = []
        self.torn, self._tail = 0, b""
        self._known, self.digests = b"", Counter[tuple[str, ...]]()

    def start(self) -> None:
        """From its files alone."""
        self._pipe, theirs = self._context.Pipe(duplex=False)
        self.process = self._context.Process(
            target=self._target, args=(*self._arguments, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def listen(self, wait_s: float = 0.0) -> None:
        """Take in what it has said."""
        try:
            while self._pipe.poll(wait_s):
                self.said.append(self._pipe.recv_bytes().decode())
                wait_s = 0.0
        except (EOFError, OSError):
            return

    def kill(self) -> None:
        """kill -9, and hear what it said before."""
        assert self.process.is_alive(), f"{self.name} ended by itself ({self.process.exitcode})"
        os.kill(self.process.pid, 9)
        self.process.join()
        self.listen()
        self._pipe.close()
        tail = self.ledger.read_bytes().rpartition(b"\n")[2]
        self.torn += bool(tail) and tail != self._tail  # else it had no time to remove what we put there

    def tear(self, tail: bytes) -> None:
        """Leave part of a line at the end of its ledger, as a power cut does."""
        with self.ledger.open("ab") as ledger:
            ledger.write(tail)
        self._tail = self.ledger.read_bytes().rpartition(b"\n")[2]

    def finish(self) -> None:
        """Wait until it has done all its jobs."""
        while self.process.is_alive():
            self.listen(0.2)
        self.listen()
        assert self.process.exitcode == 0

    def check(self) -> None:
        """Nothing that was in the ledger has changed, and a line cut short is the only damage."""
        content = self.ledger.read_bytes() if self.ledger.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        assert hashlib.sha256(whole[: len(self._known)]).digest() == hashlib.sha256(self._known).digest()
        for line in whole[len(self._known) :].splitlines():
            body = json.loads(line)["body"]
            self.digests[
                (body["type"], body["direction"], body["digest"], body["peer"], body["verdict"])
            ] += 1
        self._known = whole


def _acknowledged(owner: Mortal, server: Mortal) -> list[tuple[Mortal, tuple[str, ...]]]:
    """Where each thing that this owner said must be."""
    found: list[tuple[Mortal, tuple[str, ...]]] = []
    for line in owner.said:
        what, _, digest = line.partition(" ")
        if what == "message":
            found.append((owner, ("message", "out", digest, SERVER, "")))
        elif what == "sent":
            found.append((owner, ("parcel", "out", digest, SERVER, "")))
            found.append((server, ("parcel", "in", digest, owner.name, "accepted")))
        else:
            found.append((owner, ("parcel", "in", digest, SERVER, "accepted")))
            found.append((server, ("parcel", "out", digest, owner.name, "")))
    return found


def _lost(owners: list[Mortal], server: Mortal) -> list[tuple[str, ...]]:
    """What was acknowledged and is not there, or is there twice."""
    for one in (*owners, server):
        one.check()
    lost = []
    for owner in owners:
        for where, key in _acknowledged(owner, server):
            if where.digests[key] != 1 and not _still_writing(where, key):
                lost.append((where.name, *key))
    for one in (*owners, server):
        lost += [(one.name, "twice", *key) for key, count in one.digests.items() if count > 1]
    return lost


def _still_writing(where: Mortal, key: tuple[str, ...]) -> bool:
    """A process that lives may have written since its file was read: read it again."""
    where.check()
    return where.digests[key] == 1


def _hear_something(owners: list[Mortal]) -> None:
    heard = sum(len(owner.said) for owner in owners)
    while sum(len(owner.said) for owner in owners) == heard:
        for owner in owners:
            owner.listen(0.05)


def _free_port() -> int:
    """Below those that the kernel gives to clients: one of them must not take it while the server is dead."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _prepare(folder: Path) -> tuple[Shore, list[Owner], list[str]]:
    shore = mortals.server_at(folder / "server")
    owners = [Owner(folder / name, shore, domain=name) for name in ("beauty", "toys")]
    models = [shore.publish(make_vector(folder / f"m{n}", n, mortals.LARGE)).digest for n in range(6)]
    return shore, owners, models


def test_nothing_acknowledged_is_lost_or_counted_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shore, domains, models = _prepare(tmp_path)
    port, random, started_s = _free_port(), Random(SEED), time.monotonic()  # noqa: S311
    server = Mortal(SERVER, shore.ledger.path, mortals.serve, (shore.home, port))
    owners = [
        Mortal(o.domain, o.ledger.path, mortals.own, (o.home, o.domain, shore.home, port, models, JOBS))
        for o in domains
    ]
    everyone = [server, *owners]
    for mortal in everyone:
        mortal.start()
    kills: Counter[str] = Counter()
    torn_by_us = 0
    while kills.total() < KILLS:
        _hear_something(owners)  # however slow the machine is, work goes on between two kills
        time.sleep(random.uniform(0.0, 0.5))
        victim = random.choice(everyone)
        victim.kill()
        kills[victim.name] += 1
        if kills.total() % 4 == 0:
            victim.tear(TORN[: random.randrange(1, len(TORN))])
            torn_by_us += 1
        assert _lost(owners, server) == []
        victim.start()
    for owner, domain in zip(owners, domains, strict=True):
        owner.kill()
        kills[owner.name] += 1
        done = sum(line.startswith(("sent", "fetched")) for line in owner.said)
        arguments = (domain.home, domain.domain, shore.home, port, models, done + LAST_JOBS)
        last = Mortal(owner.name, owner.ledger, mortals.own, arguments)
        last.start()
        last.finish()
        owner.said += last.said
    server.kill()
    assert _lost(owners, server) == []
    _check_store(shore, owners)
    _check_audit(tmp_path, shore, domains)
    entries = sum(len(Ledger(mortal.ledger)) for mortal in everyone)
    acknowledged = sum(len(_acknowledged(owner, server)) for owner in owners)
    with capsys.disabled():
        print(
            f"\n{dict(kills)} kills, {entries} entries, {acknowledged} acknowledged, 0 lost, 0 twice, "
            f"{torn_by_us} lines cut short by the test, {sum(mortal.torn for mortal in everyone)} by kills, "
            f"{time.monotonic() - started_s:.0f} s"
        )
    assert acknowledged > KILLS


def _check_store(shore: Shore, owners: list[Mortal]) -> None:
    """Each parcel that was acknowledged is in the store once, with its payload."""
    shore.restart()
    for owner in owners:
        sent = [line.split(" ")[1] for line in owner.said if line.startswith("sent")]
        stored = [found.digest for found in shore.store.find(sender=owner.name)]
        assert len(set(stored)) == len(stored)
        assert set(sent) <= set(stored)
        for digest in sent:
            parcel = shore.store.get(digest)
            assert parcel is not None
            assert hashlib.sha256(parcel.payload.read_bytes()).hexdigest() == parcel.header.payload_digest


def _check_audit(folder: Path, shore: Shore, domains: list[Owner]) -> None:
    """`isthmus audit verify` of all three ledgers finds nothing."""
    bundle, root = make_bundle(folder / "bundle", shore, domains)
    SignedRoot.sign(root, [ROOT_KEY]).save(folder / "root.json")
    found = CliRunner().invoke(app, ["verify", str(bundle.path), "--root", str(folder / "root.json")])
    assert found.exit_code == 0, found.output
