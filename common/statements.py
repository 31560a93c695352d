"""Signed statements: what headers and receipts have in common.

A statement is an in-toto Statement v1 in a DSSE envelope (`common.signing`): a subject with a SHA-256,
a predicate type, and a predicate whose schema is a frozen model here. What is read must be what would be
written: a statement that does not come out of its model exactly as it went in is refused. The scalar
types allow names, codes, digests and whole numbers; there is no type for free text.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import canonical
from common.errors import ParcelError
from common.signing import PublicKey, Sealed, SigningKey, seal

NAME_PATTERN = r"^[a-z][a-z0-9_-]{0,39}$"
RUN_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
CODE_PATTERN = r"^[a-z][a-z0-9-]{0,39}$"
WITNESS_PATTERN = r"^[a-z0-9][a-z0-9.-]{0,79}$"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Run = Annotated[str, Field(pattern=RUN_PATTERN)]
Code = Annotated[str, Field(pattern=CODE_PATTERN)]
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
PublicKeyHex = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Whole = Annotated[int, Field(ge=0, le=canonical.MAX_INTEGER)]


class Exact(BaseModel):
    """Immutable; an unknown field, a missing field or another type is refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    @classmethod
    def checked(cls, values: Any) -> Self:
        """From plain JSON values. Raises ParcelError naming the field that is wrong."""
        try:
            return cls.model_validate_json(canonical.encode(values))
        except ValidationError as err:
            first = err.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:80] or "(top level)"
            raise ParcelError(f"{cls.__name__.lower()} field {where}: {first['msg']}") from None


class TreeHead(Exact):
    """Size and Merkle root of a ledger (RFC 9162, 2.1.1)."""

    size: Whole
    root: Digest


class Statement(Exact):
    """What headers and receipts share: they are signed, opened and compared byte for byte alike."""

    @classmethod
    def predicate_type(cls) -> str:
        raise NotImplementedError

    def subject(self) -> tuple[str, str]:
        """Name and SHA-256 of what the statement is about."""
        raise NotImplementedError

    def statement(self) -> dict[str, Any]:
        """The in-toto Statement v1."""
        name, digest = self.subject()
        return {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": name, "digest": {"sha256": digest}}],
            "predicateType": self.predicate_type(),
            "predicate": self.model_dump(mode="json"),
        }

    def seal(self, key: SigningKey) -> bytes:
        """The signed envelope. The same statement and key give the same bytes."""
        return seal(self.statement(), key)

    @classmethod
    def open(cls, envelope: bytes | Sealed, key: PublicKey) -> Self:
        """Verify, then read strictly. Raises SignatureError, or ParcelError naming the field."""
        sealed = Sealed.parse(envelope) if isinstance(envelope, bytes) else envelope
        return cls._read(sealed.open(key))

    @classmethod
    def stored(cls, envelope: bytes) -> Self:
        """Read an envelope that was verified when it was stored."""
        return cls._read(Sealed.parse(envelope).unverified())

    @classmethod
    def _read(cls, statement: dict[str, Any]) -> Self:
        what = cls.__name__.lower()
        if statement.get("predicateType") != cls.predicate_type():
            raise ParcelError(f"{what}: the statement is of another type")
        found = cls.checked(statement.get("predicate", {}))
        if found.statement() != statement:
            raise ParcelError(f"{what}: a field is missing, unknown or not in its only form")
        return found
