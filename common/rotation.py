"""What a shore says of its own keys, and how it goes over to new ones.

A `Rotation` names the new keys and the identity key that they replace, and is signed twice: by the old
identity key, so that nobody else can take a shore over, and by the new one, so that nobody can claim a key
that he does not have. It stands in both ledgers (type `keys`), and the root file keeps the old keys, so that
what they signed before still verifies.

    {"by_new": <DSSE envelope>, "by_old": <DSSE envelope>}     canonical JSON, one statement in both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from common import canonical
from common.errors import ParcelError
from common.files import sha256_bytes
from common.signing import PublicKey, Sealed, SigningKey
from common.statements import Name, PublicKeyHex, Statement

MAX_BYTES = 4 * canonical.MAX_BYTES


class ShoreKeys(Statement):
    """The two keys of a shore; `replaces` is the identity key before this one, empty for the first."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    shore: Name
    identity_key: PublicKeyHex
    log_key: PublicKeyHex
    replaces: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    @classmethod
    def predicate_type(cls) -> str:
        return "urn:isthmus:keys:v1"

    def subject(self) -> tuple[str, str]:
        return self.shore, sha256_bytes(bytes.fromhex(self.identity_key + self.log_key))


@dataclass(frozen=True)
class Rotation:
    """One statement under two keys; `data` is what crosses."""

    keys: ShoreKeys
    data: bytes

    @classmethod
    def make(cls, shore: str, old: SigningKey, new: SigningKey, log: PublicKey) -> Rotation:
        """`shore` goes over from `old` to `new`, with checkpoints signed by `log`."""
        keys = ShoreKeys(shore=shore, identity_key=new.public.hex, log_key=log.hex, replaces=old.public.hex)
        outer = {"by_new": keys.seal(new).decode("ascii"), "by_old": keys.seal(old).decode("ascii")}
        return cls(keys, canonical.encode(outer, max_bytes=MAX_BYTES))

    @classmethod
    def open(cls, data: bytes) -> Rotation:
        """Verified under the two keys that it names; whether the old one counts is for the caller to say.

        Raises ParcelError or SignatureError.
        """
        outer = canonical.decode(data, max_bytes=MAX_BYTES)
        if not isinstance(outer, dict) or set(outer) != {"by_new", "by_old"}:
            raise ParcelError("rotation: the fields must be exactly by_new, by_old")
        if not all(isinstance(envelope, str) for envelope in outer.values()):
            raise ParcelError("rotation: by_new and by_old are envelopes")
        by_new, by_old = (Sealed.parse(outer[name].encode("ascii")) for name in ("by_new", "by_old"))
        keys = ShoreKeys.stored(outer["by_new"].encode("ascii"))
        if not keys.replaces or by_new.payload != by_old.payload:
            raise ParcelError("rotation: not one statement about a replaced key")
        ShoreKeys.open(by_new, PublicKey.from_hex(keys.identity_key))
        ShoreKeys.open(by_old, PublicKey.from_hex(keys.replaces))
        return cls(keys, data)
