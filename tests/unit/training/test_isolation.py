"""The trainer's process reaches neither the network nor the keys: asked of a real process, both ways."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.training import isolation
from clients.training.job import ISOLATED, NOT_ISOLATED, Job, noted
from common.config import RunConfig
from common.files import write_atomic

needs_linux = pytest.mark.skipif(not isolation.possible(), reason="this host does not allow it")

PROBE = """
import ctypes, json, os, socket, sys
from pathlib import Path
from clients.training.__main__ import _isolate
from clients.training.job import read_job

job, listener = read_job(Path(sys.argv[1])), int(sys.argv[3])
_isolate(job, int(sys.argv[2]))
home, library = Path(sys.argv[4]), ctypes.CDLL(None, use_errno=True)


def connect():
    socket.create_connection(("127.0.0.1", listener), 5).close()


def undo():  # a name space of its own, with every privilege in it, in which to unmount what hides the keys
    library.unshare(0x10000000 | 0x00020000)
    for _ in range(3):
        library.umount2(os.fsencode(home), 2)
    (home / "keys" / "identity.key").read_bytes()


attempts = {
    "connect": connect,
    "key": (home / "keys" / "identity.key").read_bytes,
    "key through the old directory": Path("../../keys/identity.key").read_bytes,
    "key through the parent": Path(f"/proc/{os.getppid()}/root{home}/keys/identity.key").read_bytes,
    "change the policy": lambda: (home / "policy.toml").write_text("metrics = []"),
    "read the ledger": (home / "ledger.jsonl").read_bytes,
    "change the data": lambda: (Path(job.domain) / "domain.json").write_text("{}"),
    "write elsewhere": lambda: (home.parent / "elsewhere").write_text("x"),
    "read the data": (Path(job.domain) / "domain.json").read_bytes,
    "write its work": lambda: (Path(job.work) / "vector").write_text("x"),
    "key after unmounting": undo,
}
done = {}
for name, attempt in attempts.items():
    try:
        attempt()
        done[name] = True
    except OSError:
        done[name] = False
print(json.dumps(done))
"""
HARMLESS = {"read the data", "write its work"}


@pytest.fixture
def probe(tmp_path: Path) -> Callable[..., tuple[bytes, dict[str, bool], str]]:
    """Runs the probe as the trainer of `tmp_path/home`: what it told, what it could do, its errors."""
    home = tmp_path / "home"
    for name in ("keys/identity.key", "policy.toml", "ledger.jsonl", "data/domain.json"):
        write_atomic(home / name, b"secret", mode=0o600)
    (home / "work" / "r1").mkdir(parents=True)

    def run(**changes: object) -> tuple[bytes, dict[str, bool], str]:
        job = Job.model_validate(
            {
                "mode": "fit", "domain": str(home / "data"), "base": str(home / "no base"),
                "work": str(home / "work" / "r1"), "status": str(home / "work" / "status.json"),
                "config": RunConfig(), "home": str(home), **changes,
            }
        )  # fmt: skip
        write_atomic(home / "work" / "job.json", job.model_dump_json().encode())
        told, tell = os.pipe()
        with socket.create_server(("127.0.0.1", 0)) as listener, os.fdopen(told, "rb") as word:
            port = listener.getsockname()[1]
            done = subprocess.run(
                [sys.executable, "-P", "-c", PROBE, home / "work" / "job.json", str(tell), str(port), home],
                cwd=job.work, pass_fds=(tell,), capture_output=True, text=True, check=False,
            )  # fmt: skip
            os.close(tell)
            return word.read(), json.loads(done.stdout or "{}"), done.stderr

    return run


@needs_linux
def test_an_isolated_trainer_reaches_its_own_folders_only(
    probe: Callable[..., tuple], tmp_path: Path
) -> None:
    told, done, errors = probe()
    assert told == ISOLATED, errors
    assert {name for name, worked in done.items() if worked} == HARMLESS, errors
    assert (tmp_path / "home" / "keys" / "identity.key").read_bytes() == b"secret"
    assert (tmp_path / "home" / "work" / "r1" / "vector").read_text() == "x"


def test_the_same_probe_reaches_all_where_nothing_isolates_it(probe: Callable[..., tuple]) -> None:
    told, done, errors = probe(home="")
    assert told == NOT_ISOLATED, errors
    assert all(done.values()), done


def test_it_is_all_or_nothing(probe: Callable[..., tuple], tmp_path: Path) -> None:
    told, done, errors = probe(status=str(tmp_path / "home" / "status.json"))  # the home itself: cannot hide
    assert told == NOT_ISOLATED, errors
    assert all(done.values()), done


def test_required_and_impossible_is_refused(probe: Callable[..., tuple], tmp_path: Path) -> None:
    told, done, errors = probe(status=str(tmp_path / "home" / "status.json"), require_isolation=True)
    assert told == NOT_ISOLATED
    assert done == {}
    assert "PolicyError: the policy wants the trainer isolated" in errors


def test_one_fine_tuning_that_was_not_isolated_is_remembered(tmp_path: Path) -> None:
    fits = str(tmp_path / "fits")
    job = Job(mode="fit", domain="d", base="b", work=str(tmp_path), fits=fits, config=RunConfig())
    evaluation = job.model_copy(update={"mode": "candidates"})
    assert noted(job, isolated=True)
    assert not noted(evaluation, isolated=False)  # that one trains nothing
    assert noted(job, isolated=True)
    assert not noted(job, isolated=False)
    assert not noted(job, isolated=True)  # it may go on from a checkpoint of the one before
    assert noted(evaluation, isolated=True)
    (tmp_path / "fits" / "not-isolated").unlink()
    assert noted(job, isolated=True)


def test_another_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isolation.isolate(tmp_path, [], []) is False
