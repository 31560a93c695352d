"""Parcels: a signed header and a payload file; and the receipts for them.

Both are signed statements (`common.statements`) with an exact schema: an unknown or missing field is
refused by name, and no field can hold free text. The digest of a parcel is the SHA-256 of its envelope.

    header = draft(path, kind=Kind.CATALOG, run="demo", sender="toys", recipient=SERVER, ...)
    parcel = seal_parcel(header, path, key)
    Header.open(parcel.envelope, key.public)      # verified, or SignatureError / ParcelError
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common import merkle, tensorfile
from common.errors import ParcelError
from common.files import sha256_bytes, sha256_file
from common.ledger import Crossing, entry_line
from common.signing import SigningKey
from common.statements import Code, Digest, Exact, Name, Run, Statement, TreeHead, Whole

SERVER = "server"
EVERYONE = "*"
SKEW_S = 300
LIFETIME_S = 30 * 24 * 3600
TRAINING_FACTS = frozenset(
    {
        "batch_size",
        "domains",
        "isolated",
        "items",
        "learning_rate_e9",
        "seconds",
        "shared",
        "steps",
        "users_bucket",
    }
)


_TABLE = re.compile(r"embed|(^|\.)(wte|wpe|shared|lm_head)(\.|$)")


class Kind(StrEnum):
    """What a parcel is."""

    DOMAIN_CARD = "domain-card"
    CATALOG = "catalog"
    TASK_VECTOR = "task-vector"
    METRICS = "metrics"
    FITNESS = "fitness"
    CANDIDATE = "candidate"
    UNIVERSAL_MODEL = "universal-model"
    REVOCATION = "revocation"

    @property
    def holds_tensors(self) -> bool:
        return self in (Kind.TASK_VECTOR, Kind.CANDIDATE, Kind.UNIVERSAL_MODEL)


class Codec(StrEnum):
    """How the payload is written."""

    FP32 = "fp32"
    BF16 = "bf16"
    PARQUET = "parquet"
    JSON = "json"

    @property
    def dtype(self) -> str:
        """The safetensors dtype of every tensor under this codec; empty for files without tensors."""
        return {"fp32": "F32", "bf16": "BF16"}.get(self.value, "")


class TensorFact(Exact):
    """One row of the tensor table."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,200}$")]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**32)], ...], Field(max_length=8)]
    dtype: Literal["F32", "BF16", "F16"]
    digest: Digest

    @property
    def is_table(self) -> bool:
        """Whether its name is an embedding table's: rows that changed name the words of the data."""
        return len(self.shape) > 1 and _TABLE.search(self.name.lower()) is not None


class Privacy(Exact):
    """What was done for differential privacy, as whole numbers: `_e6` millionths, `_e12` 10^-12."""

    mechanism: Code = "none"
    clip_e6: Whole = 0
    noise_e6: Whole = 0
    epsilon_e6: Whole = 0
    delta_e12: Whole = 0


class Header(Statement):
    """Everything that is said about a payload; see `proto/README.md` field by field."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: Kind
    run: Run
    round: Whole
    sender: Name
    recipient: Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9_-]{0,39})$")]
    base_digest: Digest
    payload_digest: Digest
    payload_bytes: Annotated[Whole, Field(ge=1)]
    codec: Codec
    tensors: Annotated[tuple[TensorFact, ...], Field(max_length=tensorfile.MAX_TENSORS)]
    training: dict[str, Whole]
    privacy: Privacy
    code_version: Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9a-z]{1,12}){0,4}$")]
    code_digest: Digest
    created_s: Whole
    expires_s: Whole
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    checkpoint: TreeHead

    @classmethod
    def predicate_type(cls) -> str:
        return "urn:isthmus:parcel:v1"

    def subject(self) -> tuple[str, str]:
        return self.kind.value, self.payload_digest

    @model_validator(mode="after")
    def _agree(self) -> Self:
        unknown = sorted(set(self.training) - TRAINING_FACTS)
        if unknown:
            raise ValueError(f"training fact {unknown[0][:40]!r} is unknown")
        if self.expires_s <= self.created_s:
            raise ValueError("expires_s must come after created_s")
        wanted = {Kind.CATALOG: {Codec.PARQUET}}.get(
            self.kind, {Codec.FP32, Codec.BF16} if self.kind.holds_tensors else {Codec.JSON}
        )
        if self.codec not in wanted:
            raise ValueError(f"codec {self.codec} does not fit kind {self.kind}")
        names = [fact.name for fact in self.tensors]
        if names != sorted(set(names)) or bool(names) != self.kind.holds_tensors:
            raise ValueError("tensors must be sorted by name, once each, and only for kinds that hold any")
        return self


class Receipt(Statement):
    """The receiver's word on a parcel: which bytes, which verdict, where in its ledger.

    `checkpoint` is the receiver's tree right after the entry was made, `proof` the entry's inclusion in it,
    `prev` the digest of the entry before. With them `check_entry` proves to the sender what was recorded.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: Kind
    run: Run
    sender: Name
    receiver: Name
    parcel_digest: Digest
    payload_digest: Digest
    verdict: Literal["accepted", "refused"]
    reason: Annotated[str, Field(pattern=r"^([a-z][a-z0-9-]{0,39})?$")]
    index: Whole
    prev: Digest
    checkpoint: TreeHead
    proof: Annotated[tuple[Digest, ...], Field(max_length=64)]
    time_s: Whole

    @classmethod
    def predicate_type(cls) -> str:
        return "urn:isthmus:receipt:v1"

    def subject(self) -> tuple[str, str]:
        return "parcel", self.parcel_digest

    def check_matches(self, parcel_digest: str, header: Header) -> None:
        """Raises ParcelError unless this receipt is about that parcel, field by field."""
        expected = {
            "parcel_digest": parcel_digest,
            "payload_digest": header.payload_digest,
            "kind": header.kind,
            "run": header.run,
            "sender": header.sender,
        }
        for field, value in expected.items():
            if getattr(self, field) != value:
                raise ParcelError(f"receipt field {field}: is about another parcel")

    def check_entry(self, envelope_bytes: int, payload_bytes: int) -> None:
        """Raises ProofError unless the entry that this receipt speaks of is in the receiver's tree.

        `envelope_bytes` and `payload_bytes` are the parcel's sizes: an entry says how much crossed.
        """
        accepted = self.verdict == "accepted"
        crossing = Crossing(
            direction="in",
            channel="data",
            type="parcel",
            digest=self.parcel_digest,
            size_bytes=envelope_bytes + (payload_bytes if accepted else 0),
            peer=self.sender,
            kind=self.kind.value,
            run=self.run,
            verdict="accepted" if accepted else self.reason,
            time_s=self.time_s,
        )
        leaf = merkle.leaf_hash(entry_line(self.index, self.prev, crossing.body()))
        proof = [bytes.fromhex(node) for node in self.proof]
        merkle.verify_inclusion(
            self.index, self.checkpoint.size, leaf, proof, bytes.fromhex(self.checkpoint.root)
        )


@dataclass(frozen=True)
class Parcel:
    """A sealed header and the file it speaks of."""

    envelope: bytes
    header: Header
    payload: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the envelope, hex: the name of this parcel everywhere."""
        return sha256_bytes(self.envelope)


def draft(
    payload: Path,
    *,
    kind: Kind,
    run: str,
    sender: str,
    recipient: str,
    base_digest: str,
    codec: Codec,
    round: int = 0,
    training: Mapping[str, int] | None = None,
    privacy: Privacy | None = None,
    code_digest: str = "0" * 64,
    checkpoint: TreeHead | None = None,
    created_s: int | None = None,
    lifetime_s: int = LIFETIME_S,
) -> Header:
    """An unsigned header for the file `payload`; digests are computed here, streaming.

    Raises ParcelError naming the field that cannot be, VectorError when a tensor file is malformed.
    """
    now_s = int(time.time()) if created_s is None else created_s
    return Header.checked(
        {
            "schema": 1,
            "kind": kind.value,
            "run": run,
            "round": round,
            "sender": sender,
            "recipient": recipient,
            "base_digest": base_digest,
            "payload_digest": sha256_file(payload),
            "payload_bytes": payload.stat().st_size,
            "codec": codec.value,
            "tensors": tensorfile.tensor_facts(payload) if kind.holds_tensors else [],
            "training": dict(training or {}),
            "privacy": (privacy or Privacy()).model_dump(),
            "code_version": code_version(),
            "code_digest": code_digest,
            "created_s": now_s,
            "expires_s": now_s + lifetime_s,
            "nonce": secrets.token_hex(16),
            "checkpoint": (checkpoint or TreeHead(size=0, root=merkle.EMPTY_ROOT.hex())).model_dump(),
        }
    )


def seal_parcel(header: Header, payload: Path, key: SigningKey) -> Parcel:
    """Sign `header`. A domain never calls this: its key is the egress gate's."""
    return Parcel(header.seal(key), header, payload)


def code_version() -> str:
    """The installed version of Isthmus, or 0.0 when it runs from a checkout."""
    try:
        return metadata.version("isthmus")
    except metadata.PackageNotFoundError:
        return "0.0"


def bucket(users: int) -> int:
    """A user count rounded down to 1, 2 or 5 times a power of ten; what may be said of a count.

    >>> [bucket(n) for n in (0, 7, 49, 480, 22363)]
    [0, 5, 20, 200, 20000]
    """
    scale = 10 ** (len(str(users)) - 1)
    return next((step * scale for step in (5, 2, 1) if users >= step * scale), 0)
