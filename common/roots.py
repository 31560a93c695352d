"""The root file: whose keys count in a federation, signed by a threshold of root keys.

`root.json` names the server's and every member's keys, the witnesses, who was revoked and from which entry
of the server's ledger on. It has a version and an expiry, in the manner of TUF (theupdateframework.io,
section 5.3): the next version is valid only if a threshold of the keys of this one and of its own signed
it. It is what an auditor must have got by a way of his own; all else is verified from it.

    {"root": {...}, "signatures": [{"keyid": ..., "sig": ...}]}     canonical JSON, sorted by keyid

A log's origin (`log_origin`) follows from its key, so that no two logs share one.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common import canonical
from common.errors import ParcelError, SignatureError
from common.files import write_atomic
from common.notes import Verifier
from common.parcels import SERVER, SKEW_S
from common.signing import PublicKey, SigningKey, pae
from common.statements import WITNESS_PATTERN, Digest, Exact, Name, PublicKeyHex, Whole

PAYLOAD_TYPE = "application/vnd.isthmus.root.v1+json"
LIFETIME_S = 365 * 24 * 3600


class Keys(Exact):
    """The two keys of a shore: `identity_key` signs parcels, orders and receipts, `log_key` checkpoints."""

    identity_key: PublicKeyHex
    log_key: PublicKeyHex

    @property
    def identity(self) -> PublicKey:
        return PublicKey.from_hex(self.identity_key)


class RetiredKeys(Keys):
    """Keys that were replaced, or revoked before their owner joined again.

    `size` is the size of the server's ledger then: what is older stays valid.
    """

    size: Whole


class Party(Keys):
    """A shore; `retired` are its earlier keys, the newest first."""

    retired: Annotated[tuple[RetiredKeys, ...], Field(max_length=64)] = ()

    def generations(self) -> tuple[Keys, ...]:
        """The keys that count, then those that did before."""
        return (self, *self.retired)

    def keys_of(self, key_id: str) -> Keys:
        """The generation whose identity key has this id. Raises SignatureError when there is none."""
        for keys in self.generations():
            if keys.identity.key_id == key_id:
                return keys
        raise SignatureError("signed with a key that is not this shore's")


class RootMember(Party):
    """A domain. `revoked_size` is the size of the server's ledger when it was revoked, `revoked_s` the time.

    What the server accepted before that size stays valid; `revoked_s` 0 means: in good standing.
    """

    domain: Name
    pseudonym: Name
    certificate_fingerprint: Digest
    revoked_s: Whole = 0
    revoked_size: Whole = 0


class Witness(Exact):
    """An independent cosigner of checkpoints."""

    name: Annotated[str, Field(pattern=WITNESS_PATTERN)]
    key: PublicKeyHex

    @property
    def verifier(self) -> Verifier:
        """Verifies its cosignatures."""
        return Verifier(self.name, PublicKey.from_hex(self.key))

    @property
    def peer(self) -> str:
        """How it is called in ledgers."""
        return f"witness/{self.name}"


class Root(Exact):
    """The content of `root.json`."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    version: Annotated[Whole, Field(ge=1)]
    created_s: Whole
    expires_s: Whole
    threshold: Annotated[Whole, Field(ge=1, le=32)]
    root_keys: Annotated[tuple[PublicKeyHex, ...], Field(min_length=1, max_length=32)]
    server: Party
    witnesses: Annotated[tuple[Witness, ...], Field(max_length=32)]
    members: Annotated[tuple[RootMember, ...], Field(max_length=4096)]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.threshold > len(self.root_keys):
            raise ValueError(f"a threshold of {self.threshold} needs as many root keys")
        for what, values in (
            ("root_keys", self.root_keys),
            ("members", [member.domain for member in self.members]),
            ("witnesses", [witness.name for witness in self.witnesses]),
        ):
            if list(values) != sorted(set(values)):
                raise ValueError(f"{what} must be sorted, once each")
        parties = [keys for party in (self.server, *self.members) for keys in party.generations()]
        keys = [key for party in parties for key in (party.identity_key, party.log_key)]
        keys += [witness.key for witness in self.witnesses] + list(self.root_keys)
        if len(set(keys)) < len(keys):
            raise ValueError("a key stands for two purposes")
        return self

    def parties(self) -> dict[str, Party]:
        """Every shore by name: "server", and the domains."""
        return {SERVER: self.server, **{member.domain: member for member in self.members}}


def log_origin(shore: str, key: PublicKey) -> str:
    """The origin line of a shore's log: what its checkpoints are named."""
    return f"isthmus/{shore}/{key.key_id[:16]}"


def log_verifiers(shore: str, party: Party) -> list[Verifier]:
    """Who signs the checkpoints of `shore`'s log, then who did before."""
    keys = [PublicKey.from_hex(keys.log_key) for keys in party.generations()]
    return [Verifier(log_origin(shore, key), key) for key in keys]


@dataclass(frozen=True)
class SignedRoot:
    """A root and the signatures under it, by key id."""

    root: Root
    signatures: dict[str, bytes]

    @classmethod
    def parse(cls, data: bytes) -> SignedRoot:
        """Read strictly; no signature is trusted yet. Raises ParcelError naming the field."""
        outer = canonical.decode(data.removesuffix(b"\n"))
        if not isinstance(outer, dict) or set(outer) != {"root", "signatures"}:
            raise ParcelError("root.json: the fields must be exactly root, signatures")
        found = cls(Root.checked(outer["root"]), _signatures(outer["signatures"]))
        if found.encode() != data.removesuffix(b"\n") + b"\n":
            raise ParcelError("root.json: a field is missing, or not in its only form")
        return found

    @classmethod
    def load(cls, path: Path) -> SignedRoot:
        """Read a file and check it by itself. Raises ParcelError or SignatureError naming it."""
        try:
            signed = cls.parse(path.read_bytes())
            signed.verify_self()
        except FileNotFoundError:
            raise ParcelError(f"{path}: no such root file", next_step="ask the operator for it") from None
        except ParcelError as err:
            raise type(err)(
                f"{path}: {err.message}", next_step="ask the operator for a new root.json"
            ) from None
        return signed

    @classmethod
    def sign(cls, root: Root, keys: Iterable[SigningKey]) -> SignedRoot:
        """`root` with a signature by each of `keys`."""
        return cls(root, {}).with_signatures(keys)

    def with_signatures(self, keys: Iterable[SigningKey]) -> SignedRoot:
        """The same root with more signatures."""
        added = {key.public.key_id: key.sign(self._signed_bytes()) for key in keys}
        return SignedRoot(self.root, {**self.signatures, **added})

    def encode(self) -> bytes:
        """The file's content."""
        signatures = [
            {"keyid": key_id, "sig": base64.b64encode(signature).decode()}
            for key_id, signature in sorted(self.signatures.items())
        ]
        outer = {"root": self.root.model_dump(mode="json"), "signatures": signatures}
        return canonical.encode(outer) + b"\n"

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises StorageError."""
        write_atomic(path, self.encode())

    def verify_self(self) -> None:
        """Raises SignatureError unless a threshold of the root's own keys signed it."""
        self._verify(self.root.root_keys, self.root.threshold)

    def verify_after(self, trusted: Root, *, now_s: int) -> None:
        """Raises SignatureError or ParcelError unless this is the version that follows `trusted`.

        It must be one version on, signed by a threshold of both versions' keys, and not expired.
        """
        if self.root.version != trusted.version + 1:
            raise ParcelError(f"root.json: version {self.root.version} does not follow {trusted.version}")
        self._verify(trusted.root_keys, trusted.threshold)
        self.verify_self()
        if self.root.expires_s < now_s - SKEW_S:
            raise ParcelError(f"root.json: version {self.root.version} has expired")

    def _verify(self, keys: Sequence[str], threshold: int) -> None:
        message, valid = self._signed_bytes(), 0
        for key in map(PublicKey.from_hex, keys):
            signature = self.signatures.get(key.key_id)
            if signature is None:
                continue
            key.verify(signature, message)
            valid += 1
        if valid < threshold:
            raise SignatureError(
                f"root.json: {valid} of {threshold} root keys signed version {self.root.version}"
            )

    def _signed_bytes(self) -> bytes:
        return pae(PAYLOAD_TYPE, canonical.encode(self.root.model_dump(mode="json")))


def _signatures(value: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if not isinstance(value, list) or len(value) > 64:
        raise ParcelError("root.json: signatures must be a list")
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
            raise ParcelError("root.json: a signature has exactly keyid and sig")
        found[str(entry["keyid"])] = canonical.decode_base64(entry["sig"])
    return found
