"""New keys over a real Exchange: what counts before and after, and what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalFederation

from clients.cosigning import exchange_checkpoints
from clients.home import ClientHome
from clients.rotation import accept_server_keys, rotate
from clients.up import up
from common.audit.bundle import Bundle
from common.audit.outcome import AuditReport
from common.audit.verify import verify
from common.errors import ConfigError, RefusedError, SignatureError
from common.parcels import SERVER, Codec, Kind, draft, seal_parcel
from common.payloads import encode_values
from common.roots import Root
from common.rotation import Rotation
from common.signing import SigningKey
from common.tls import certificate_fingerprint
from server.export import export as export_server
from server.intake import Intake
from server.roots import newest_root
from server.rotation import rotate as take
from server.rotation import rotate_own


@pytest.fixture
def federation(
    tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    with LocalFederation(tmp_path / "federation", pico_model, make_domain) as made:
        for domain in made.domains:
            exchange_checkpoints(made.owner(domain))
        yield made


def _audit(federation: LocalFederation, root: Root | None = None) -> AuditReport:
    from clients.export import export

    bundle = Bundle(federation.folder / "bundle", create=True)
    export_server(federation.server_path, bundle, payloads=False)
    for domain in federation.domains:
        export(federation.path(domain), bundle, payloads=False)
    return verify(bundle, root or newest_root(federation.server()).root)


def _refusal(federation: LocalFederation, home: ClientHome, key: SigningKey) -> str:
    """Why the server refuses a parcel under `key`."""
    payload = home.path / "card.json"
    payload.write_bytes(encode_values({"items": 3}))
    header = draft(
        payload,
        kind=Kind.DOMAIN_CARD,
        run="run",
        sender=home.config.domain,
        recipient=SERVER,
        base_digest="0" * 64,
        codec=Codec.JSON,
    )
    server = federation.server()
    intake = Intake(server.store, server.ledger, server.members, server.identity)
    fingerprint = certificate_fingerprint(home.tls.certificate.read_bytes())
    with pytest.raises(RefusedError) as caught:
        intake.begin(seal_parcel(header, payload, key).envelope, fingerprint)
    return caught.value.reason


def test_the_new_keys_count_and_the_old_ones_did(federation: LocalFederation) -> None:
    home = federation.owner("toys")
    old = SigningKey.load(home.keys / "identity.key")
    renewed = rotate(home.path)
    new = SigningKey.load(renewed.keys / "identity.key")
    assert new.public != old.public
    assert _refusal(federation, renewed, old) == "rotated"
    assert _refusal(federation, renewed, new) == "wrong-run"  # it got past rules 1 to 4
    exchange_checkpoints(federation.owner("toys"))  # cosigned on from what the old log key had signed
    assert _audit(federation).all_findings == []
    again = rotate(home.path)
    assert _refusal(federation, again, new) == "rotated"
    exchange_checkpoints(federation.owner("toys"))
    report = _audit(federation)
    assert report.all_findings == []
    (member,) = (one for one in newest_root(federation.server()).root.members if one.domain == "toys")
    assert [keys.identity_key for keys in member.retired] == [new.public.hex, old.public.hex]
    sent = next(domain for domain in report.domains if domain.domain == "toys").sent
    assert sent["keys"].count == 2


def test_a_rotation_is_taken_once_and_only_from_the_key_that_counts(federation: LocalFederation) -> None:
    server, home = federation.server(), federation.owner("toys")
    old = SigningKey.load(home.keys / "identity.key")
    new, log, third = (SigningKey(letter * 32) for letter in (b"n", b"l", b"t"))
    member = server.member("toys")
    rotation = Rotation.make("toys", old, new, log.public)

    def reason(member: Any, rotation: Rotation) -> str:
        with pytest.raises(RefusedError) as caught:
            take(server, server.members, member, rotation.data)
        return caught.value.reason

    assert reason(server.member("books"), rotation) == "sender"
    assert reason(member, Rotation.make("toys", third, new, log.public)) == "rotated"  # never a key of it
    taken = SigningKey.load(federation.owner("books").keys / "identity.key")
    assert reason(member, Rotation.make("toys", old, taken, log.public)) == "already-member"
    assert reason(member, Rotation.make("toys", old, new, new.public)) == "already-member"
    size = take(server, server.members, member, rotation.data)
    assert take(server, server.members, member, rotation.data) == size
    assert size == len(server.ledger)
    assert reason(member, Rotation.make("toys", old, third, log.public)) == "rotated"  # twice
    server.members.revoke("toys", ledger_size=len(server.ledger))
    assert reason(member, Rotation.make("toys", new, third, log.public)) == "revoked"


def test_a_crash_in_the_middle_is_finished(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = federation.owner("toys")
    old = SigningKey.load(home.keys / "identity.key").public

    really = Path.replace

    def crash(path: Path, target: Path) -> Path:
        if path.parent.name == "next" and path.name == "log.key":
            raise KeyboardInterrupt  # after the identity key
        return really(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            rotate(home.path)
    assert [path.name for path in (home.keys / "next").iterdir()] == ["log.key"]
    with pytest.raises(ConfigError, match="client rotate"):
        up(federation.owner("toys"))
    renewed = rotate(home.path)
    assert renewed.gate.public_key != old
    assert federation.server().member("toys").identity_key == renewed.gate.public_key.hex
    assert not list((renewed.keys / "next").iterdir())
    exchange_checkpoints(renewed)
    assert _audit(federation).all_findings == []


def test_not_while_it_runs_or_works(federation: LocalFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    home = federation.owner("toys")
    monkeypatch.setattr("clients.rotation.listens", lambda *_: True)
    with pytest.raises(ConfigError, match="processes run"):
        rotate(home.path)
    monkeypatch.undo()
    home.journal.put("order/run/contribute", {"done": False})
    with pytest.raises(ConfigError, match="unfinished"):
        rotate(home.path)


def test_an_audit_tells_a_forged_history_of_keys(federation: LocalFederation) -> None:
    rotate(federation.path("toys"))
    root = newest_root(federation.server()).root
    (toys,) = (member for member in root.members if member.domain == "toys")
    stranger = toys.retired[0].model_copy(update={"identity_key": SigningKey(b"s" * 32).public.hex})
    forged = root.model_copy(
        update={
            "members": tuple(
                toys.model_copy(update={"retired": (stranger,)}) if member.domain == "toys" else member
                for member in root.members
            )
        }
    )
    codes = {(found.shore, found.code) for found in _audit(federation, forged).all_findings}
    assert {("toys", "keys"), (SERVER, "keys")} <= codes


def test_who_joins_again_after_a_revocation_keeps_its_past(federation: LocalFederation) -> None:
    server = federation.server()
    known = server.member("toys")
    assert known.retiring(7)[0] == {
        "identity_key": known.identity_key, "log_key": known.log_key, "size": 7,
    }  # fmt: skip
    again = replace(known, identity_key="a" * 64, log_key="b" * 64, retired=known.retiring(7))
    assert again.in_root.keys_of(known.key.key_id).identity_key == known.identity_key
    with pytest.raises(SignatureError):
        again.in_root.keys_of("0" * 64)


def test_the_server_goes_over_and_its_owners_follow_by_hand(
    federation: LocalFederation, tmp_path: Path
) -> None:
    before = federation.server().identity.public
    assert federation.exchange is not None
    rotations = []
    for number in range(2):
        renewed = rotate_own(federation.server_path, tmp_path / f"{number}.json")
        rotations.append((tmp_path / f"{number}.json").read_bytes())
    federation.serve_exchange()
    assert renewed.identity.public != before
    home = federation.owner("toys")
    with pytest.raises(SignatureError):
        exchange_checkpoints(home)  # signed by a log key that it does not know
    for wrong in (
        rotations[1],
        Rotation.make(SERVER, SigningKey(b"x" * 32), renewed.identity, renewed.log_signer.key.public).data,
    ):
        with pytest.raises(SignatureError, match="do not replace"):
            accept_server_keys(home.path, wrong)
    for rotation in rotations:
        for domain in federation.domains:
            accept_server_keys(federation.path(domain), rotation)
    with pytest.raises(SignatureError, match="do not replace"):
        accept_server_keys(home.path, rotations[0])
    for domain in federation.domains:
        exchange_checkpoints(federation.owner(domain))
    report = _audit(federation)
    assert report.all_findings == []
    retired = newest_root(federation.server()).root.server.retired
    assert [keys.identity_key for keys in retired][-1] == before.hex
    assert len(retired) == 2


def test_the_servers_rotation_survives_a_crash(
    federation: LocalFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "rotation.json", federation.server().identity.public
    for step in ("retire_keys", "take_new_keys", "keep_checkpoint"):
        with monkeypatch.context() as patched:
            patched.setattr(f"server.home.ServerHome.{step}", _crash)
            with pytest.raises(KeyboardInterrupt):
                rotate_own(federation.server_path, out)
    renewed = rotate_own(federation.server_path, out)
    assert [keys.identity_key for keys in renewed.retired_keys] == [before.hex]
    assert Rotation.open(out.read_bytes()).keys.identity_key == renewed.identity.public.hex
    federation.serve_exchange()
    accept_server_keys(federation.path("toys"), out.read_bytes())
    accept_server_keys(federation.path("books"), out.read_bytes())
    assert _audit(federation).all_findings == []


def _crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_server_does_not_go_over_while_it_works(federation: LocalFederation, tmp_path: Path) -> None:
    federation.run()
    with pytest.raises(ConfigError, match="run is open"):
        rotate_own(federation.server_path, tmp_path / "rotation.json")
    federation.server().runs.open()[0].stop()
