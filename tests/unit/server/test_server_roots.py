"""The server's root file: a version for every change, and none without the key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, ParcelError, SignatureError
from common.roots import SignedRoot
from common.signing import SigningKey
from server.cli import app, create_home
from server.home import ServerHome
from server.members import Member
from server.root_cli import app as root_app
from server.roots import current_root, draft_root, install_root, newest_root, root_path

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


def test_two_of_three_sign(home: ServerHome, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(root_app, list(arguments))
        assert result.exit_code == 0, result.output
        return str(result.output)

    newest_root(home)
    at, draft = ("--home", str(home.path)), str(tmp_path / "draft.json")
    own = home.keys / "root.key"
    names = []
    for name in ("b", "c"):
        assert "next: isthmus root draft" in run("key", str(tmp_path / name))
        names += ["--root-key", SigningKey.load(tmp_path / name).public.hex]
    names += ["--root-key", SigningKey.load(own).public.hex]
    run("draft", "--out", draft, *at, *names, "--threshold", "2")
    run("sign", draft, "--key", str(tmp_path / "b"))
    with pytest.raises(SignatureError, match="1 of 2"):
        install_root(home, SignedRoot.parse(Path(draft).read_bytes()))
    run("sign", draft, "--key", str(tmp_path / "c"))
    with pytest.raises(SignatureError, match="0 of 1"):  # nobody of the version before agreed
        install_root(home, SignedRoot.parse(Path(draft).read_bytes()))
    run("sign", draft, "--key", str(own))
    assert "version 2" in run("install", draft, *at)
    assert "2 of 3 must sign" in run("show", str(root_path(home)))
    _join(home, "toys", 1)
    with pytest.raises(ConfigError, match="2 root keys must sign"):
        newest_root(home)
    assert current_root(home).root.version == 2
    run("draft", "--out", draft, *at)
    run("sign", draft, "--key", str(tmp_path / "b"))
    run("sign", draft, "--key", str(tmp_path / "c"))
    run("install", draft, *at)
    assert newest_root(home).root.members[0].domain == "toys"
    with pytest.raises(ParcelError, match="does not follow"):  # nor is an old one taken back
        install_root(home, SignedRoot.load(home.path / "roots" / "2.json"))


def test_a_draft_is_of_today(home: ServerHome) -> None:
    newest_root(home)
    signer = SigningKey.load(home.keys / "root.key")
    stale = draft_root(home).with_signatures([signer])
    _join(home, "toys", 1)
    with pytest.raises(ConfigError, match="have changed"):
        install_root(home, stale)
    expired = draft_root(home).root.model_copy(update={"expires_s": 1})
    with pytest.raises(ParcelError, match="expired"):
        install_root(home, SignedRoot.sign(expired, [signer]))


def test_impossible_drafts(home: ServerHome) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        draft_root(home)
    newest_root(home)
    with pytest.raises(ConfigError, match="threshold"):
        draft_root(home, threshold=2)
    for wrong in ("xyz", home.identity.public.hex):
        with pytest.raises(ConfigError, match="no root file"):
            draft_root(home, [wrong])
