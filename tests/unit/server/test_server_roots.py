"""The server's root file: a version for every change, and none without the key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, SignatureError
from common.roots import SignedRoot
from common.signing import SigningKey
from server.cli import app, create_home
from server.home import ServerHome
from server.members import Member
from server.roots import newest_root, root_path

DATA = {
    "name": "test",
    "hosts": ["127.0.0.1"],
    "bind": "127.0.0.1",
    "ports": {"fleet": 9101, "exchange": 9102, "enrol": 9103, "superlink": 9104},
}


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return create_home(tmp_path / "home", DATA)


def _join(home: ServerHome, domain: str, first: int) -> None:
    keys = [SigningKey(bytes([first + n]) * 32).public.hex for n in (0, 1)]
    home.members.put(Member(domain, f"domain-{first}", *keys, "PEM", "f" * 64, "12", int(time.time())))


def test_a_version_for_every_change(home: ServerHome) -> None:
    first = newest_root(home)
    assert (first.root.version, first.root.members) == (1, ())
    assert newest_root(home) == first
    _join(home, "toys", 1)
    second = newest_root(home)
    assert (second.root.version, [member.domain for member in second.root.members]) == (2, ["toys"])
    second.verify_after(first.root, now_s=int(time.time()))
    assert SignedRoot.load(root_path(home)) == second
    home.members.revoke("toys", ledger_size=3)
    third = newest_root(home).root.members[0]
    assert (third.revoked_size, third.revoked_s > 0) == (3, True)


def test_the_key_may_be_elsewhere(home: ServerHome, tmp_path: Path) -> None:
    newest_root(home)
    away = tmp_path / "root.key"
    (home.keys / "root.key").rename(away)
    newest_root(home)  # nothing has changed: no key is needed
    _join(home, "toys", 1)
    with pytest.raises(ConfigError, match="no root key"):
        newest_root(home)
    assert newest_root(home, away).root.version == 2


def test_another_key_signs_no_root_of_ours(home: ServerHome, tmp_path: Path) -> None:
    newest_root(home)
    _join(home, "toys", 1)
    SigningKey.generate(tmp_path / "other.key")
    with pytest.raises(SignatureError, match="0 of 1"):
        newest_root(home, tmp_path / "other.key")
    assert SignedRoot.load(root_path(home)).root.version == 1


def test_revoke_and_root_from_the_command_line(home: ServerHome, tmp_path: Path) -> None:
    _join(home, "toys", 1)
    run = CliRunner().invoke
    at = ["--home", str(home.path)]
    shown = run(app, ["root", *at, "--out", str(tmp_path / "root.json")])
    assert shown.exit_code == 0
    assert "version 1, 1 members" in shown.output
    assert "fingerprint" in shown.output
    assert run(app, ["revoke", "toys", *at]).exit_code == 0
    assert isinstance(run(app, ["revoke", "toys", *at]).exception, Exception)
    assert "version 2" in run(app, ["root", *at]).output
    assert "revoked" in run(app, ["status", *at]).output
    assert SignedRoot.load(tmp_path / "root.json").root.version == 1
