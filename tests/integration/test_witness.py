"""Cosigning over real gRPC: two domains, a server and an independent witness, and who lies to whom."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from localgrid import LocalFederation
from typer.testing import CliRunner

from clients.cosigning import exchange_checkpoints
from common.audit.bundle import Bundle
from common.audit.cli import app as audit_command
from common.audit.outcome import AuditReport
from common.audit.verify import verify
from common.checkpoints import LedgerHome
from common.cosigning import Cosigner
from common.errors import LedgerError, ParcelError, ProofError, SignatureError
from common.ledger import Crossing, Ledger, walk
from common.merkle import leaf_hash, verify_consistency, verify_inclusion
from common.notes import Checkpoint
from common.parcels import SERVER
from common.processes import free_ports
from common.roots import SignedRoot
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import connect
from common.witness.cli import app as witness_command
from common.witness.client import ask_witnesses
from common.witness.home import WitnessHome
from common.witness.up import serve
from server.cli import app as server_command
from server.roots import keep_checkpoints, newest_root


class World:
    """A federation whose shores have spoken a little, and its witness."""

    def __init__(self, federation: LocalFederation, folder: Path) -> None:
        self.federation, self.folder = federation, folder
        newest_root(federation.server()).save(folder / "root.json")
        self.witness_path = folder / "witness"
        _run(
            witness_command,
            *("init", "--name", "w1.example", "--root", str(folder / "root.json")),
            *("--home", str(self.witness_path), "--port", str(free_ports(1)[0])),
        )
        _run(witness_command, "card", "--out", str(folder / "card.json"), "--home", str(self.witness_path))
        _run(server_command, "witness", str(folder / "card.json"), "--home", str(federation.server_path))
        for domain in federation.domains:
            self.witness.card.add_to(federation.path(domain))

    @property
    def witness(self) -> WitnessHome:
        return WitnessHome(self.witness_path)

    def talk(self) -> None:
        """A control message each way with each domain, on both shores' books."""
        server = self.federation.server()
        for domain in self.federation.domains:
            order = Crossing("out", "control", "message", "a" * 64, 9, domain, "message", "run")
            server.ledger.record(order)
            self.federation.owner(domain).ledger.record(
                Crossing("in", "control", "message", "a" * 64, 9, SERVER, "message", "run")
            )

    def look(self) -> None:
        """Everybody looks at everybody's ledger."""
        keep_checkpoints(self.federation.server())
        for domain in self.federation.domains:
            exchange_checkpoints(self.federation.owner(domain))

    def audit(self, name: str, witnessed: bool = True) -> AuditReport:
        homes = [self.federation.server_path, *map(self.federation.path, self.federation.domains)]
        out = self.folder / name
        for home in [*homes, self.witness_path] if witnessed else homes:
            _run(audit_command, "bundle", str(home), "--out", str(out))
        return verify(Bundle(out), newest_root(self.federation.server()).root)


def _run(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return str(result.output)


def _rewrite(home: LedgerHome, drop: Callable[[dict[str, Any]], bool]) -> None:
    """The books without what is to be forgotten, and everything that this home signed about them, anew."""
    bodies = [entry.body for entry, _ in walk(home.path / "ledger.jsonl") if not drop(entry.body)]
    for path in (home.path / "ledger.jsonl", home.path / "checkpoint"):
        path.unlink(missing_ok=True)
    shutil.rmtree(home.path / "checkpoints", ignore_errors=True)
    forged = Ledger(home.path / "ledger.jsonl")
    for body in bodies:
        forged.append(body)


def _spoken(body: dict[str, Any]) -> bool:
    return body["type"] == "message"


def _codes(report: AuditReport) -> set[tuple[str, str]]:
    return {(finding.shore, finding.code) for finding in report.all_findings}


@pytest.fixture
def world(tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any]) -> Iterator[World]:
    with LocalFederation(tmp_path / "federation", pico_model, make_domain) as federation:
        made = World(federation, tmp_path)
        with serve(made.witness):
            made.talk()
            made.look()
            yield made


def test_everybody_cosigned_and_the_audit_is_clean(world: World) -> None:
    world.talk()
    world.look()
    report = world.audit("bundle")
    assert report.all_findings == []
    cosigners = {shore.shore: set(shore.cosigned) for shore in report.shores}
    domains = set(world.federation.domains)
    witness = "witness/w1.example"
    assert cosigners == {SERVER: {*domains, witness}, **{name: {SERVER, witness} for name in domains}}
    told = [line for domain in report.domains for line in domain.not_proven]
    assert sum("the last that a witness saw" in line for line in told) == len(domains)
    status = _run(witness_command, "status", "--home", str(world.witness_path))
    assert all(f"{shore}: " in status for shore in (SERVER, *domains))
    assert sorted(path.name for path in world.witness_path.iterdir()) == [
        *("cosigned", "keys", "root.json", "witness.toml")
    ]


def test_a_witness_learns_the_root_files_one_by_one(world: World) -> None:
    assert world.witness.root.root.version == 2
    assert [witness.name for witness in world.witness.root.root.witnesses] == ["w1.example"]
    stranger = SignedRoot.load(world.folder / "root.json")
    with pytest.raises(ParcelError, match="does not follow"):
        world.witness.update_root(stranger.encode())
    changed = stranger.root.model_copy(update={"version": 3})
    with pytest.raises(SignatureError):
        world.witness.update_root(SignedRoot(changed, stranger.signatures).encode())


def test_the_server_proves_its_ledger_over_grpc(world: World) -> None:
    home = world.federation.owner("toys")
    ledger = world.federation.server().ledger
    size = len(ledger)
    with connect(home.config.server.exchange, home.tls.ca, home.tls) as channel:
        stub = rpc.LogStub(channel)
        note = stub.GetCheckpoint(pb.GetCheckpointRequest(since=2))
        now = Checkpoint.open(note.note, home.server_logs[0])
        verify_consistency(2, now.size, list(note.proof), ledger_root(ledger, 2), now.root)
        proof = stub.Inclusion(pb.InclusionRequest(index=1, size=size)).proof
        line = world.federation.server_path.joinpath("ledger.jsonl").read_bytes().splitlines()[1]
        verify_inclusion(1, size, leaf_hash(line), list(proof), ledger_root(ledger, size))
        proof = stub.Consistency(pb.ConsistencyRequest(old_size=3, size=size)).proof
        verify_consistency(3, size, list(proof), ledger_root(ledger, 3), ledger_root(ledger, size))
        for wrong in (pb.InclusionRequest(index=10**6, size=size), pb.InclusionRequest(index=1, size=10**6)):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Inclusion(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            rpc.WitnessStub(channel).UpdateRoot(pb.UpdateRootRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def ledger_root(ledger: Ledger, size: int) -> bytes:
    return bytes.fromhex(ledger.tree_head(size).root)


def test_a_server_that_rewrote_its_books_is_told_by_domains_and_witness(world: World) -> None:
    server = world.federation.server()
    _rewrite(server, _spoken)
    world.federation.serve_exchange()
    with pytest.raises(ProofError, match="has not grown"):
        exchange_checkpoints(world.federation.owner("toys"))
    with pytest.raises(LedgerError):
        keep_checkpoints(world.federation.server())
    assert _codes(world.audit("bundle")) & {(SERVER, "truncated"), (SERVER, "rewritten")}


def test_a_domain_and_the_server_together_are_told_by_the_witness(world: World) -> None:
    """Both forget the same message, sign anew, and hand in nothing of what they had cosigned."""
    for home in (world.federation.server(), world.federation.owner("toys")):
        _rewrite(home, lambda body: _spoken(body) and body["peer"] in (SERVER, "toys"))
        shutil.rmtree(home.path / "cosigned")
    shutil.rmtree(world.federation.path("books") / "cosigned")  # and the other domain lost what it had
    alone = world.audit("without", witnessed=False)
    assert _codes(alone) == {("toys", "unwitnessed"), (SERVER, "unwitnessed")}
    codes = _codes(world.audit("bundle"))
    assert codes & {("toys", "truncated"), ("toys", "rewritten")}
    assert codes & {(SERVER, "truncated"), (SERVER, "rewritten")}


def test_the_server_and_the_witness_together_are_told_by_the_domains(world: World) -> None:
    """The server forgets a message, and the witness forgets what it saw and cosigns the new books."""
    shutil.rmtree(world.witness_path / "cosigned")
    server = world.federation.server()
    _rewrite(server, lambda body: _spoken(body) and body["peer"] == "toys")
    shutil.rmtree(server.path / "cosigned")
    keep_checkpoints(world.federation.server())
    codes = _codes(world.audit("bundle"))
    assert codes & {(SERVER, "truncated"), (SERVER, "rewritten")}
    assert ("toys", "never-sent") in codes


@pytest.mark.parametrize("answer", ["", "no note", "of-another-tree"])
def test_a_witness_that_answers_nonsense_stops_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    home = world.federation.owner("toys")
    before = home.cosigned_path("witness/w1.example").read_text("utf-8")
    nonsense = before if answer == "of-another-tree" else answer
    monkeypatch.setattr(Cosigner, "cosign", lambda *_: nonsense)
    world.talk()
    with caplog.at_level("WARNING"):
        ask_witnesses(home, home.gate.release_checkpoint)
    assert "witness w1.example did not cosign" in caplog.text
    assert home.cosigned_path("witness/w1.example").read_text("utf-8") == before


def test_a_ledger_that_no_witness_saw_is_a_finding(world: World) -> None:
    for path in (world.witness_path / "cosigned", world.federation.path("toys") / "checkpoints"):
        shutil.rmtree(path)
    assert _codes(world.audit("bundle")) == {("toys", "unwitnessed")}


def test_strange_notes_in_a_bundle_are_findings(world: World) -> None:
    world.audit("bundle")
    bundle = Bundle(world.folder / "bundle")
    good = bundle.notes()[0]
    for number, note in enumerate(("", "no note", good.replace("isthmus/", "isthmus/other-", 1), good[:-10])):
        (bundle.path / "checkpoints" / f"{number}.note").write_text(note)
    report = verify(bundle, newest_root(world.federation.server()).root)
    assert [(found.shore, found.code) for found in report.all_findings] == [("bundle", "checkpoint")] * 4
