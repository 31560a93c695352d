"""A bundle of a small federation verifies, and every way to falsify its books is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from crossing import (
    ROOT_KEY,
    RUN,
    Owner,
    Shore,
    make_bundle,
    make_catalog,
    make_metrics,
    make_root,
    make_signer,
    make_vector,
)
from typer.testing import CliRunner

from common.audit.bundle import Bundle
from common.audit.cli import app
from common.audit.outcome import AuditReport
from common.audit.verify import _Audit, _Parcel, verify
from common.errors import RefusedError
from common.files import sha256_bytes
from common.ledger import Crossing, Ledger
from common.notes import Signer
from common.parcels import EVERYONE, SERVER, Codec, Kind, Privacy, seal_parcel
from common.revocation import Revocation
from common.roots import Root, SignedRoot
from common.signing import SigningKey


class World:
    """Two domains and a server after a run: two parcels of each kind, a refusal, a cut link, a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shore = Shore(folder / "server")
        self.toys = Owner(folder / "toys", self.shore)
        self.beauty = Owner(folder / "beauty", self.shore, domain="beauty")
        with self.shore.serve() as serving:
            address = f"127.0.0.1:{serving.port}"
            for owner in (self.toys, self.beauty):
                self._message(owner, "out", b"contribute")
                self._contribute(owner, address)
                self._message(owner, "in", b"done")
            late = make_vector(folder / "late", 3)
            with pytest.raises(RefusedError):
                self.toys.client(address).send(self.toys.gate.release(self.toys.draft(late, round=9), late))
            self.unsent = self.toys.vector(5)
            model = self.shore.publish(make_vector(folder / "model", 7))
            for owner in (self.toys, self.beauty):
                owner.client(address).fetch(model.digest, owner.home / "got")
        self.model = model

    def _contribute(self, owner: Owner, address: str) -> None:
        client, gate = owner.client(address), owner.gate
        catalog = make_catalog(owner.home / "catalog", owner.domain)
        metrics = make_metrics(owner.home / "metrics", **{"zero-shot/recall@10": 0.5})
        client.send(gate.release(owner.draft(catalog, Kind.CATALOG), catalog))
        client.send(owner.vector())
        client.send(gate.release(owner.draft(metrics, Kind.METRICS), metrics))

    def _message(self, owner: Owner, way: str, content: bytes) -> None:
        """A control message, as both shores would log it; `way` is the server's."""
        order = Crossing("out", "control", "message", sha256_bytes(content), len(content), "", "message", RUN)
        back = "in" if way == "out" else "out"
        self.shore.ledger.record(replace(order, direction=way, peer=owner.domain))
        owner.ledger.record(replace(order, direction=back, peer=SERVER))

    def owners(self) -> list[Owner]:
        return [self.toys, self.beauty]

    def bundle(self, path: Path) -> Bundle:
        return make_bundle(path, self.shore, self.owners())[0]

    def root(self) -> Root:
        return make_root(self.shore, self.owners())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def bundle(world: World, tmp_path: Path) -> Bundle:
    return world.bundle(tmp_path / "bundle")


def _bodies(bundle: Bundle, shore: str) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in bundle.ledger(shore).read_bytes().splitlines()]


def _write(bundle: Bundle, shore: str, bodies: list[dict[str, Any]], signer: Signer | None = None) -> None:
    """Make a ledger of these bodies with a chain of its own; signed anew where there is a `signer`."""
    path = bundle.ledger(shore)
    old_checkpoint = (path.parent / "checkpoint").read_bytes()
    forged = Ledger(path.parent / "forged.jsonl")
    for body in bodies:
        forged.append(body)
    if signer is None:
        shutil.copy(forged.path, path)
        (path.parent / "checkpoint").write_bytes(old_checkpoint)
    else:
        bundle.put_ledger(shore, forged, signer)


def _own_signer(world: World, shore: str) -> Signer:
    keys = {SERVER: world.shore.log_key, "toys": world.toys.log_key, "beauty": world.beauty.log_key}
    return make_signer(shore, keys[shore])


def _index(bodies: list[dict[str, Any]], **wanted: str) -> int:
    """The first entry with these values."""
    return next(i for i, body in enumerate(bodies) if all(body[k] == v for k, v in wanted.items()))


def _codes(report: AuditReport, shore: str) -> set[str]:
    return {finding.code for finding in report.all_findings if finding.shore == shore}


def test_an_honest_bundle_is_clean(world: World, bundle: Bundle) -> None:
    report = verify(bundle, world.root())
    assert report.all_findings == []
    assert [shore.shore for shore in report.shores] == ["beauty", SERVER, "toys"]
    assert all(shore.entries == shore.checkpoint_size for shore in report.shores)
    toys = next(domain for domain in report.domains if domain.domain == "toys")
    assert {kind: tally.count for kind, tally in toys.sent.items()} == {
        "catalog": 1,
        "task-vector": 3,  # one accepted, one refused, one that never left
        "metrics": 1,
        "receipt": 1,
        "message": 1,
    }
    assert toys.sent["metrics"].bytes == sum(
        body["size_bytes"]
        for body in _bodies(bundle, "toys")
        if body["kind"] == "metrics" and body["type"] == "parcel"
    )
    assert toys.received["universal-model"].count == 1
    assert toys.signer == world.toys.key.public.key_id
    assert [item["digest"] for item in toys.unacknowledged] == [world.unsent.digest]
    assert any("no ledger" in limit for limit in toys.not_proven)
    assert any("trainer of 3 task vectors" in limit for limit in toys.not_proven)


def test_what_a_trainer_could_reach_is_said(world: World, bundle: Bundle, tmp_path: Path) -> None:
    audit = _Audit(bundle, world.root(), lambda *_: None)
    for number, word in enumerate((1, 0, 0, None)):
        facts = {} if word is None else {"isolated": word}
        header = world.toys.draft(make_vector(tmp_path / "v", number), training=facts)
        audit._parcels[str(number)] = _Parcel(header, 1, world.root().server)
    first, second = audit._not_isolated("toys")
    assert "2 task vectors" in first and first.endswith("it had")
    assert "1 task vectors" in second and second.endswith("do not say")
    assert list(audit._not_isolated("beauty")) == []


def test_one_shore_alone_is_verified_and_says_what_is_missing(world: World, bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "shores" / "toys")
    report = verify(bundle, world.root())
    assert report.clean
    toys = next(domain for domain in report.domains if domain.domain == "toys")
    assert toys.sent["catalog"].count == 1
    assert any("ledger of toys" in limit for limit in toys.not_proven)


def test_missing_payloads_are_said(world: World, bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "payloads")
    report = verify(bundle, world.root())
    assert report.clean
    assert any("payloads are not in the bundle" in limit for limit in report.domains[0].not_proven)


@pytest.mark.parametrize("shore", ["toys", SERVER])
@pytest.mark.parametrize("index", [0, 2, 3, 5])
def test_an_edited_line_is_named(world: World, bundle: Bundle, shore: str, index: int) -> None:
    path = bundle.ledger(shore)
    lines = path.read_bytes().splitlines(keepends=True)
    size = json.loads(lines[index])["body"]["size_bytes"]
    lines[index] = lines[index].replace(f'"size_bytes":{size}'.encode(), f'"size_bytes":{size + 1}'.encode())
    path.write_bytes(b"".join(lines))
    report = verify(bundle, world.root())
    assert ("damaged", index) in {(f.code, f.index) for f in report.all_findings if f.shore == shore}


def test_a_missing_line_is_named(world: World, bundle: Bundle) -> None:
    path = bundle.ledger("toys")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    report = verify(bundle, world.root())
    assert ("damaged", 3) in {(f.code, f.index) for f in report.all_findings if f.shore == "toys"}


@pytest.mark.parametrize("shore", ["toys", SERVER])
def test_a_rewritten_ledger_is_not_the_signed_one(world: World, bundle: Bundle, shore: str) -> None:
    bodies = _bodies(bundle, shore)
    bodies[-1]["time_s"] += 1
    _write(bundle, shore, bodies)
    report = verify(bundle, world.root())
    assert "rewritten" in _codes(report, shore)
    assert 0 < next(f for f in report.all_findings if f.code == "rewritten").index < len(bodies)


@pytest.mark.parametrize("shore", ["toys", SERVER])
def test_a_rewritten_and_signed_ledger_is_not_the_one_of_its_receipts(
    world: World, bundle: Bundle, shore: str
) -> None:
    bodies = _bodies(bundle, shore)
    bodies[0]["time_s"] += 1
    _write(bundle, shore, bodies, _own_signer(world, shore))
    report = verify(bundle, world.root())
    assert "other-history" in _codes(report, shore)


def test_dropped_entries_show(world: World, bundle: Bundle) -> None:
    path = bundle.ledger("toys")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    report = verify(bundle, world.root())
    assert _codes(report, "toys") >= {"truncated"}
    assert next(f for f in report.all_findings if f.code == "truncated").index == len(lines) - 1


def test_what_a_domain_drops_and_signs_the_server_still_has(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, "toys")
    dropped = bodies.pop(_index(bodies, type="parcel", kind="metrics", direction="out"))
    _write(bundle, "toys", bodies, _own_signer(world, "toys"))
    report = verify(bundle, world.root())
    server = _bodies(bundle, SERVER)
    never = [found for found in report.all_findings if found.code == "never-sent" and found.shore == SERVER]
    assert [server[found.index]["digest"] for found in never] == [dropped["digest"]]
    assert not report.clean


def test_a_rollback_is_older_than_what_was_signed_since(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, SERVER)
    _write(bundle, SERVER, bodies[:4], _own_signer(world, SERVER))
    report = verify(bundle, world.root())
    assert "other-history" in _codes(report, SERVER)


def test_reordered_entries_show(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, SERVER)
    bodies[2], bodies[4] = bodies[4], bodies[2]
    _write(bundle, SERVER, bodies, _own_signer(world, SERVER))
    assert "other-history" in _codes(verify(bundle, world.root()), SERVER)


def test_a_parcel_counted_twice_shows(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, SERVER)
    accepted = bodies[_index(bodies, type="parcel", verdict="accepted")]
    _write(bundle, SERVER, [*bodies, accepted], _own_signer(world, SERVER))
    report = verify(bundle, world.root())
    assert ("repeated", len(bodies)) in {(found.code, found.index) for found in report.all_findings}


def test_a_swapped_payload_shows(world: World, bundle: Bundle) -> None:
    vector = next(
        p
        for p in (bundle.path / "payloads").iterdir()
        if p.stat().st_size < 400 and b"layer" in p.read_bytes()
    )
    content = vector.read_bytes()
    vector.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "payload" in {found.code for found in verify(bundle, world.root()).all_findings}


def test_the_server_cannot_claim_what_a_domain_never_signed(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, SERVER)
    claim = dict(bodies[_index(bodies, kind="metrics", verdict="accepted", peer="toys", type="parcel")])
    claim["digest"] = "ab" * 32
    _write(bundle, SERVER, [*bodies, claim], _own_signer(world, SERVER))
    report = verify(bundle, world.root())
    at = {(found.code, found.index) for found in report.all_findings if found.shore == SERVER}
    assert {("header", len(bodies)), ("never-sent", len(bodies))} <= at


def test_a_domain_cannot_claim_a_receipt_that_the_server_never_gave(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, "toys")
    receipt = dict(bodies[_index(bodies, type="receipt", direction="in")])
    receipt["digest"] = "ab" * 32
    _write(bundle, "toys", [*bodies, receipt], _own_signer(world, "toys"))
    report = verify(bundle, world.root())
    at = {(found.code, found.index) for found in report.all_findings if found.shore == "toys"}
    assert {("receipt", len(bodies)), ("never-sent", len(bodies))} <= at


def test_a_control_message_that_nobody_sent_shows(world: World, bundle: Bundle) -> None:
    bodies = _bodies(bundle, SERVER)
    reply = dict(bodies[_index(bodies, type="message", direction="in")])
    _write(bundle, SERVER, [*bodies, reply], _own_signer(world, SERVER))
    report = verify(bundle, world.root())
    assert ("never-sent", len(bodies)) in {(found.code, found.index) for found in report.all_findings}


@pytest.mark.parametrize(
    ("tensors", "kind", "code"),
    [
        ({"layer.weight": (8, 4), "embeddings.word.weight": (8, 4)}, Kind.TASK_VECTOR, "embedding-table"),
        ({"layer.weight": (8, 4)}, Kind.UNIVERSAL_MODEL, "kind"),
    ],
)
def test_what_may_not_leave_is_found_even_if_both_shores_recorded_it(
    world: World, bundle: Bundle, tmp_path: Path, tensors: dict[str, tuple[int, ...]], kind: Kind, code: str
) -> None:
    payload = make_vector(tmp_path / "leak", 4, tensors)
    header = world.toys.draft(payload, kind, codec=Codec.FP32)
    parcel = seal_parcel(header, payload, world.toys.key)
    bundle.put_envelopes([parcel.envelope])
    size = len(parcel.envelope) + parcel.header.payload_bytes
    entry = Crossing("out", "data", "parcel", parcel.digest, size, SERVER, kind.value, RUN)
    for shore, crossing in (
        ("toys", entry),
        (SERVER, replace(entry, direction="in", peer="toys", verdict="accepted")),
    ):
        bodies = _bodies(bundle, shore)
        _write(bundle, shore, [*bodies, asdict(crossing)], _own_signer(world, shore))
        at = {(found.code, found.index) for found in verify(bundle, world.root()).all_findings}
        assert (code, len(bodies)) in at


def test_a_header_signed_with_another_key_shows(world: World, bundle: Bundle) -> None:
    stranger = SigningKey(b"s" * 32)
    root = world.root()
    members = tuple(
        m.model_copy(update={"identity_key": stranger.public.hex}) if m.domain == "toys" else m
        for m in root.members
    )
    report = verify(bundle, root.model_copy(update={"members": members}))
    assert {"header", "receipt"} <= _codes(report, "toys")
    assert _codes(report, "beauty") == set()


def test_a_checkpoint_signed_with_another_key_shows(world: World, bundle: Bundle) -> None:
    bundle.put_ledger("toys", world.toys.ledger, make_signer("toys", SigningKey(b"s" * 32)))
    assert _codes(verify(bundle, world.root()), "toys") == {"checkpoint"}
    (bundle.path / "shores" / "toys" / "checkpoint").unlink()
    assert _codes(verify(bundle, world.root()), "toys") == {"no-checkpoint"}


def test_what_came_after_a_revocation_shows(world: World, bundle: Bundle) -> None:
    root, bodies = world.root(), _bodies(bundle, SERVER)
    last = max(
        i
        for i, b in enumerate(bodies)
        if b["peer"] == "toys" and b["verdict"] == "accepted" and b["type"] == "parcel"
    )

    def revoked_at(size: int) -> Root:
        members = tuple(
            m.model_copy(update={"revoked_s": 5, "revoked_size": size}) if m.domain == "toys" else m
            for m in root.members
        )
        return root.model_copy(update={"members": members})

    assert verify(bundle, revoked_at(last + 1)).clean
    report = verify(bundle, revoked_at(last))
    assert [(found.code, found.index) for found in report.all_findings] == [("revoked", last)]


def test_a_withdrawal_shows_and_so_does_the_vector_when_it_is_accepted_again(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    shore, toys = world.shore, world.toys
    vector = toys.vector()
    payload = tmp_path / "revocation.json"
    payload.write_bytes(Revocation(vector.digest, vector.header.payload_digest).encode())
    said = {"sender": SERVER, "recipient": EVERYONE, "training": {}}
    header = toys.draft(payload, Kind.REVOCATION).model_copy(update=said)
    revocation = seal_parcel(header, payload, shore.key)
    shore.store.publish(revocation)
    with shore.serve() as serving:
        client = toys.client(f"127.0.0.1:{serving.port}")
        client.fetch(revocation.digest, toys.home / "got")
        report = verify(world.bundle(tmp_path / "once"), world.root())
        assert report.clean
        withdrawn = {domain.domain: domain.withdrawn for domain in report.domains}
        assert withdrawn["beauty"] == []
        assert [(entry["run"], entry["told"]) for entry in withdrawn["toys"]] == [(RUN, True)]

        bundle = Bundle(tmp_path / "once")
        (bundle.path / "payloads" / revocation.header.payload_digest).unlink()
        assert all(not domain.withdrawn for domain in verify(bundle, world.root()).domains)

        again = toys.gate.release(toys.draft(vector.payload, round=1), vector.payload)
        receipt = client.send(again)  # a server that forgot what was withdrawn
    report = verify(world.bundle(tmp_path / "twice"), world.root())
    assert [(f.shore, f.index, f.code) for f in report.all_findings] == [(SERVER, receipt.index, "withdrawn")]


def test_strangers_in_a_bundle_show(world: World, bundle: Bundle) -> None:
    shutil.copytree(bundle.path / "shores" / "toys", bundle.path / "shores" / "yachts")
    assert _codes(verify(bundle, world.root()), "yachts") == {"unknown-shore"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"garbage",
        lambda data: data + b"\n",
        lambda data: b"\x00" + data[1:],
        lambda data: data.replace(b"accepted", b"Accepted", 1),
        lambda data: data.replace(b'"type"', b'"typo"', 1),
        lambda data: data.replace(b"data", b"dat\xc3\xa4", 1),
        lambda data: b"[" * 100_000,
        lambda data: b"",
    ],
)
def test_any_damage_is_a_finding_and_no_crash(
    world: World, bundle: Bundle, damage: Callable[[bytes], bytes]
) -> None:
    path = bundle.ledger("toys")
    path.write_bytes(damage(path.read_bytes()))
    assert "toys" in {found.shore for found in verify(bundle, world.root()).all_findings}


def test_privacy_spend_is_counted(world: World, bundle: Bundle, tmp_path: Path) -> None:
    payload = make_vector(tmp_path / "private", 4)
    spent = Privacy(mechanism="dp-sgd", clip_e6=1, noise_e6=2, epsilon_e6=3_000_000, delta_e12=5)
    parcel = seal_parcel(world.toys.draft(payload, privacy=spent), payload, world.toys.key)
    bundle.put_envelopes([parcel.envelope])
    size = len(parcel.envelope) + parcel.header.payload_bytes
    entry = Crossing("out", "data", "parcel", parcel.digest, size, SERVER, "task-vector", RUN)
    _write(bundle, "toys", [*_bodies(bundle, "toys"), asdict(entry)], _own_signer(world, "toys"))
    toys = next(domain for domain in verify(bundle, world.root()).domains if domain.domain == "toys")
    assert [(p["kind"], p["epsilon_e6"]) for p in toys.privacy] == [("task-vector", 3_000_000)]


def test_the_command(world: World, bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root.json"
    SignedRoot.sign(world.root(), [ROOT_KEY]).save(root)
    run = CliRunner().invoke
    found = run(app, ["verify", str(bundle.path), "--root", str(root)])
    assert (found.exit_code, "clean: no findings" in found.output) == (0, True)
    as_json = json.loads(
        run(app, ["verify", str(bundle.path), "--root", str(root), "--format", "json"]).stdout
    )
    assert (as_json["clean"], len(as_json["domains"])) == (True, 2)
    rows = json.loads(
        run(
            app, ["show", str(bundle.path), "--shore", "toys", "--kind", "catalog", "--format", "json"]
        ).stdout
    )
    assert {row["type"] for row in rows} == {"parcel", "receipt"}
    bodies = _bodies(bundle, "toys")
    bodies[1]["size_bytes"] += 1
    _write(bundle, "toys", bodies)
    failed = run(app, ["verify", str(bundle.path), "--root", str(root)])
    assert failed.exit_code == 1
    assert "FINDING  toys, entry" in failed.output


@pytest.mark.parametrize("peer", ["unknown", "yachts", "", "server"])
@pytest.mark.parametrize("type_", ["parcel", "receipt", "message"])
def test_dealings_with_strangers_show(world: World, bundle: Bundle, peer: str, type_: Any) -> None:
    channel: Any = "control" if type_ == "message" else "data"
    entry = Crossing("in", channel, type_, "ab" * 32, 5, peer, "task-vector", RUN, "accepted", 1)
    bodies = _bodies(bundle, SERVER)
    _write(bundle, SERVER, [*bodies, asdict(entry)], _own_signer(world, SERVER))
    at = [(found.shore, found.index) for found in verify(bundle, world.root()).all_findings]
    assert (SERVER, len(bodies)) in at
