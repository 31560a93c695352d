"""Two shores for tests of the crossing: a server's parts and an owner's, in temporary folders.

Real keys, real certificates, real files; the network comes in only with `Shore.serve`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from clients.egress import EgressGate
from clients.exchange_client import ExchangeClient
from clients.policy import EgressPolicy
from common.audit.bundle import Bundle
from common.catalog import Catalog
from common.checkpoints import LedgerHome
from common.files import sha256_bytes, write_atomic
from common.ledger import Journal, Ledger
from common.notes import Signer
from common.parcels import EVERYONE, SERVER, Codec, Header, Kind, Parcel, draft, seal_parcel
from common.payloads import encode_values
from common.roots import Party, Root, RootMember, log_origin
from common.signing import SigningKey
from common.tls import CertificateAuthority, TlsFiles, create_ca, issue_server_certificate, make_csr
from common.wire.enrolment import EnrolmentFacts
from server.enrolment import Enroller
from server.exchange import Serving, serve
from server.intake import Intake
from server.members import Invitations, Member, Members
from server.store import OpenRun, ParcelStore

TENSORS = {"layer.bias": (4,), "layer.weight": (8, 4)}
BASE = sha256_bytes(b"base")
RUN = "demo"
NODE_KEY = b"ecdsa-sha2-nistp384 AAAA node"


def make_vector(path: Path, seed: int = 0, tensors: dict[str, tuple[int, ...]] = TENSORS) -> Path:
    """A float32 task vector of small normal numbers."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in tensors.items()}
    save_file(values, path)
    return path


def make_catalog(path: Path, domain: str) -> Path:
    Catalog(domain, ["a", "b"], {"title": ["oak spoon", "red bowl"]}).write(path)
    return path


def make_metrics(path: Path, **values: float) -> Path:
    write_atomic(path, encode_values(values or {"recall@10": 0.5}))
    return path


class Book(LedgerHome):
    """The ledger of a shore at `path`, and what goes with it."""

    def __init__(self, path: Path, shore: str) -> None:
        self.path, self._shore = path, shore

    @property
    def shore(self) -> str:
        return self._shore


@dataclass
class Shore:
    """The server: call `restart` to lose everything that only memory holds."""

    home: Path
    tensors: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(TENSORS))

    def __post_init__(self) -> None:
        self.ca: CertificateAuthority = create_ca(self.home / "keys")
        self.tls: TlsFiles = issue_server_certificate(self.ca, self.home / "keys", ["127.0.0.1"])
        self.key = SigningKey.ensure(self.home / "keys" / "identity.key")
        self.log_key = SigningKey.ensure(self.home / "keys" / "log.key")
        self.restart()
        self.store.open_run(
            OpenRun(
                run=RUN,
                base_digest=BASE,
                domains=frozenset({"toys", "beauty"}),
                tensors=self.tensors,
                rounds=3,
                metrics=frozenset({"recall@10", "ndcg@10"}),
                max_norm=1000.0,
            )
        )

    def restart(self) -> None:
        self.store = ParcelStore(self.home / "store")
        self.ledger = Ledger(self.home / "ledger.jsonl")
        self.members = Members(self.home / "members.json")
        self.invitations = Invitations(self.home / "invitations.json")
        self.intake = Intake(self.store, self.ledger, self.members, self.key)
        self.enroller = Enroller(
            self.members, self.invitations, self.ca, self.key.public, lambda domain, _: f"node-{domain}"
        )

    def serve(self, address: str = "127.0.0.1:0") -> Serving:
        return serve(self.intake, Book(self.home, SERVER), self.key.public, address, self.tls)

    def publish(self, payload: Path, recipient: str = EVERYONE, kind: Kind = Kind.UNIVERSAL_MODEL) -> Parcel:
        header = draft(
            payload,
            kind=kind,
            run=RUN,
            sender=SERVER,
            recipient=recipient,
            base_digest=BASE,
            codec=Codec.FP32,
        )
        parcel = seal_parcel(header, payload, self.key)
        self.store.publish(parcel)
        return parcel


@dataclass
class Owner:
    """One domain, enrolled at `shore` unless `member` says otherwise."""

    home: Path
    shore: Shore
    domain: str = "toys"
    policy: EgressPolicy = EgressPolicy()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        self.key = SigningKey.ensure(self.home / "keys" / "identity.key")
        self.log_key = SigningKey.ensure(self.home / "keys" / "log.key")
        self.member: Member = self._enrol()
        self.tls = TlsFiles(
            self.shore.ca.certificate, self.home / "keys" / "tls.crt", self.home / "keys" / "tls.key"
        )
        write_atomic(self.tls.certificate, self.member.certificate.encode())
        self.restart()

    def _enrol(self) -> Member:
        token = self.shore.invitations.invite(self.domain)
        csr = make_csr(self.domain, self.home / "keys" / "tls.key")
        facts = EnrolmentFacts(
            self.domain, token, self.key.public.hex, self.log_key.public.hex, csr, NODE_KEY
        )
        return self.shore.enroller.enrol(facts, self.key.sign(facts.signed_bytes()))

    def restart(self) -> None:
        self.ledger = Ledger(self.home / "ledger.jsonl")
        self.journal = Journal(self.home / "journal.jsonl")
        self.gate = EgressGate(
            self.policy, self.key, self.ledger, self.journal, self.home / "outbox", sender=self.domain
        )
        self.gate.agree(RUN, BASE, self.shore.tensors, labels=("zero-shot",))

    def client(self, address: str, **options: object) -> ExchangeClient:
        settings = {"retry_for_s": 0.0, **options}
        return ExchangeClient(address, self.tls, self.gate, self.shore.key.public, **settings)

    def draft(self, payload: Path, kind: Kind = Kind.TASK_VECTOR, **changes: object) -> Header:
        codec = {Kind.TASK_VECTOR: Codec.FP32, Kind.CATALOG: Codec.PARQUET}.get(kind, Codec.JSON)
        facts: dict = {
            "kind": kind,
            "run": RUN,
            "sender": self.domain,
            "recipient": SERVER,
            "base_digest": BASE,
            "codec": codec,
            "training": {"users_bucket": 200},
        }
        return draft(payload, **{**facts, **changes})

    def vector(self, seed: int = 0) -> Parcel:
        """A released task vector."""
        payload = make_vector(self.home / f"vector-{seed}.safetensors", seed, self.shore.tensors)
        return self.gate.release(self.draft(payload), payload)

    def ungated(self, payload: Path, kind: Kind = Kind.TASK_VECTOR, **changes: object) -> Parcel:
        """What a malicious owner would sign; `is_released` is forged too, so that its client sends it."""
        parcel = seal_parcel(self.draft(payload, kind, **changes), payload, self.key)
        self.journal.put(f"released/{parcel.digest}", {})
        return parcel


ROOT_KEY = SigningKey(b"root" * 8)


def make_bundle(path: Path, shore: Shore, owners: list[Owner]) -> tuple[Bundle, Root]:
    """Everything of these shores for an auditor, and the root that says whose keys count."""
    made = Bundle(path, create=True)
    for name, party in ((SERVER, shore), *((owner.domain, owner) for owner in owners)):
        made.put_ledger(name, Ledger(party.ledger.path), make_signer(name, party.log_key))
    for stored in shore.store.records():
        made.put_envelopes([shore.store.read_bytes(stored.digest)])
        made.put_payload(stored.payload_digest, shore.store.object_path(stored.payload_digest))
    for owner in owners:
        outbox = owner.home / "outbox"
        made.put_envelopes(path.read_bytes() for path in outbox.glob("*.dsse"))
        made.put_receipts(path.read_bytes() for path in outbox.glob("*.receipt"))
    return made, make_root(shore, owners)


def make_signer(shore: str, key: SigningKey) -> Signer:
    """Signs the checkpoints of a shore."""
    return Signer(log_origin(shore, key.public), key)


def make_root(shore: Shore, owners: list[Owner]) -> Root:
    """Whose keys count."""
    members = [
        RootMember(
            domain=owner.domain,
            pseudonym=owner.member.pseudonym,
            identity_key=owner.key.public.hex,
            log_key=owner.log_key.public.hex,
            certificate_fingerprint=owner.member.certificate_fingerprint,
        )
        for owner in sorted(owners, key=lambda owner: owner.domain)
    ]
    return Root(
        version=1,
        created_s=1,
        expires_s=2**40,
        threshold=1,
        root_keys=(ROOT_KEY.public.hex,),
        server=Party(identity_key=shore.key.public.hex, log_key=shore.log_key.public.hex),
        witnesses=(),
        members=tuple(members),
    )


def in_thread(call: object) -> threading.Thread:
    """Run `call` beside the test."""
    thread = threading.Thread(target=call)
    thread.start()
    return thread
