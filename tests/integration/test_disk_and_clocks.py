"""A disk that is really full, and clocks that are a day apart."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from crossing import Owner, Shore, make_bundle, make_vector

from clients import exchange_client
from common.audit.verify import verify
from common.errors import ParcelError, RefusedError, StorageError
from common.ledger import Crossing, Ledger
from server.intake import Intake

DAY_S = 24 * 3600
HOUR_S = 3600
CROSSING = Crossing("out", "data", "parcel", "a" * 64, 10, "server", "catalog", "demo", "", 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_acknowledged(small_disk: Path) -> None:
    ledger = Ledger(small_disk / "ledger.jsonl")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 << 10))
    with pytest.raises(StorageError, match="No space left"):
        for _ in range(1000):
            ledger.record(CROSSING)
    entries = len(ledger)
    assert 50 < entries < 1000
    assert len(Ledger(ledger.path)) == entries
    assert ledger.path.read_bytes().endswith(b"\n")
    ballast.unlink()
    assert ledger.record(CROSSING).index == entries
    assert len(Ledger(ledger.path)) == entries + 1


def test_a_limit_on_the_size_of_files_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    program = """
        import resource, signal, sys
        from pathlib import Path
        from common.errors import StorageError
        from common.ledger import AppendOnlyLog
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        log = AppendOnlyLog(Path(sys.argv[1]))
        try:
            while True:
                print(log.append({"filler": "x" * 90}).index, flush=True)
        except StorageError as err:
            print(err.message)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(log.append({"filler": "y"}).index)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "log")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *acknowledged, problem, last = said
    assert acknowledged == [str(index) for index in range(len(acknowledged))]
    assert len(acknowledged) > 2
    assert problem.endswith("cannot write: File too large")
    assert last == str(len(acknowledged))


def _at(shore: Shore, shift_s: int) -> Intake:
    """The server's intake with another clock."""
    return Intake(shore.store, shore.ledger, shore.members, shore.key, clock=lambda: time.time() + shift_s)


@pytest.mark.parametrize(
    ("server_s", "lifetime_s", "refused"),
    [(-DAY_S, 30 * DAY_S, True), (DAY_S, HOUR_S, True), (DAY_S, 30 * DAY_S, False)],
    ids=[
        "the owner is a day ahead",
        "the owner is a day behind",
        "the owner is a day behind, with time left",
    ],
)
def test_a_clock_a_day_off(tmp_path: Path, server_s: int, lifetime_s: int, refused: bool) -> None:
    shore = Shore(tmp_path / "server")
    toys = Owner(tmp_path / "toys", shore)
    shore.intake = _at(shore, server_s)
    payload = make_vector(tmp_path / "v")
    parcel = toys.gate.release(toys.draft(payload, lifetime_s=lifetime_s), payload)
    with shore.serve() as serving:
        client = toys.client(f"127.0.0.1:{serving.port}")
        if refused:
            with pytest.raises(RefusedError, match="check the clock") as caught:
                client.send(parcel)
            assert caught.value.reason == "expired"
        else:
            assert client.send(parcel).verdict == "accepted"
    assert verify(*make_bundle(tmp_path / "bundle", shore, [toys])).all_findings == []


@pytest.mark.parametrize("shift_s", [-DAY_S, DAY_S])
def test_what_the_server_published_a_day_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: int
) -> None:
    shore = Shore(tmp_path / "server")
    toys = Owner(tmp_path / "toys", shore)
    now_s = time.time()
    model = shore.publish(make_vector(tmp_path / "model", 7))
    with shore.serve() as serving:
        client = toys.client(f"127.0.0.1:{serving.port}")
        monkeypatch.setattr(exchange_client, "time", SimpleNamespace(time=lambda: now_s + 31 * DAY_S))
        with pytest.raises(ParcelError, match="expired"):
            client.fetch(model.digest, tmp_path / "got")
        monkeypatch.setattr(exchange_client, "time", SimpleNamespace(time=lambda: now_s + shift_s))
        client.fetch(model.digest, tmp_path / "got")
    monkeypatch.undo()
    assert verify(*make_bundle(tmp_path / "bundle", shore, [toys])).all_findings == []
