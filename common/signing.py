"""Ed25519 keys and DSSE envelopes.

An envelope is canonical JSON with exactly `payload`, `payloadType` and one entry in `signatures`
(DSSE 1.0, https://github.com/secure-systems-lab/dsse). Stricter than the standard on purpose: no
unknown field, one signature, standard base64 only, canonical bytes inside and out, so that no unsigned
byte can ride along. The statement inside is read only after its signature has been verified.

    >>> key = SigningKey(bytes(32))
    >>> Sealed.parse(seal({"a": 1}, key)).open(key.public)
    {'a': 1}
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common import canonical
from common.errors import ConfigError, ParcelError, SignatureError
from common.files import sha256_bytes, write_atomic

STATEMENT_TYPE = "application/vnd.in-toto+json"


@dataclass(frozen=True)
class PublicKey:
    """32 raw bytes of an Ed25519 public key."""

    raw: bytes

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        """Raises ParcelError unless `text` is 64 lower-case hexadecimal digits of a public key."""
        try:
            raw = bytes.fromhex(text)
            Ed25519PublicKey.from_public_bytes(raw)
        except ValueError:
            raw = b""
        if raw.hex() != text or len(raw) != 32:
            raise ParcelError("an Ed25519 public key is 64 lower-case hexadecimal digits")
        return cls(raw)

    @property
    def hex(self) -> str:
        return self.raw.hex()

    @property
    def key_id(self) -> str:
        """SHA-256 of the raw key, hex: the `keyid` of envelopes."""
        return sha256_bytes(self.raw)

    @property
    def fingerprint(self) -> str:
        """The first 128 bits of `key_id` in groups of four, to be compared by eye or by telephone."""
        return " ".join(self.key_id[start : start + 4] for start in range(0, 32, 4))

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raises SignatureError unless `signature` over `message` is this key's."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            raise SignatureError("the signature does not verify under the expected key") from None


class SigningKey:
    """An Ed25519 private key. Made where it is used; the file never leaves."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, path: Path) -> SigningKey:
        """Make a key and write it to `path` (PKCS#8 PEM, mode 0600). Raises ConfigError if it exists."""
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_atomic(path, pem, mode=0o600, replace=False)
        except FileExistsError:
            raise ConfigError(f"{path}: a key exists already", next_step="keep it, or move it away") from None
        return cls(private.private_bytes_raw())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read what `generate` wrote. Raises ConfigError if it is missing, open to others or no key."""
        try:
            pem, mode = path.read_bytes(), path.stat().st_mode
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such key", next_step="join or initialise first") from None
        if os.name == "posix" and mode & 0o077:
            raise ConfigError(f"{path}: others can read this key", next_step=f"chmod 600 {path}")
        try:
            private = serialization.load_pem_private_key(pem, password=None)
        except ValueError:
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"{path}: not an Ed25519 private key in PEM", next_step="restore the file")
        return cls(private.private_bytes_raw())

    @classmethod
    def ensure(cls, path: Path) -> SigningKey:
        """Load the key, or generate it if there is none."""
        return cls.load(path) if path.exists() else cls.generate(path)

    def sign(self, message: bytes) -> bytes:
        """64 bytes. Sign statements with `seal`, never bare bytes that someone else chose."""
        return self._key.sign(message)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is really signed."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def seal(statement: dict[str, Any], key: SigningKey, *, payload_type: str = STATEMENT_TYPE) -> bytes:
    """The canonical bytes of a DSSE envelope around `statement`, signed with `key`."""
    payload = canonical.encode(statement)
    signature = key.sign(pae(payload_type, payload))
    return canonical.encode(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": key.public.key_id, "sig": base64.b64encode(signature).decode()}],
        },
        max_bytes=2 * canonical.MAX_BYTES,
    )


@dataclass(frozen=True)
class Sealed:
    """An envelope that was parsed strictly; nothing in it is trusted before `open`."""

    payload: bytes
    payload_type: str
    key_id: str
    signature: bytes

    @classmethod
    def parse(cls, envelope: bytes) -> Sealed:
        """Raises ParcelError unless `envelope` is exactly one of ours in form."""
        outer = canonical.decode(envelope, max_bytes=2 * canonical.MAX_BYTES)
        _fields(outer, {"payload", "payloadType", "signatures"}, "envelope")
        signatures = outer["signatures"]
        if not isinstance(signatures, list) or len(signatures) != 1:
            raise ParcelError("envelope: exactly one signature is expected")
        _fields(signatures[0], {"keyid", "sig"}, "envelope signature")
        key_id, payload_type = signatures[0]["keyid"], outer["payloadType"]
        if not isinstance(key_id, str) or not isinstance(payload_type, str):
            raise ParcelError("envelope: keyid and payloadType must be strings")
        return cls(
            canonical.decode_base64(outer["payload"]),
            payload_type,
            key_id,
            canonical.decode_base64(signatures[0]["sig"]),
        )

    def open(self, key: PublicKey, *, payload_type: str = STATEMENT_TYPE) -> dict[str, Any]:
        """The statement, after verifying its signature. Raises SignatureError or ParcelError."""
        if self.key_id != key.key_id:
            raise SignatureError("envelope: signed with another key than the expected one")
        if self.payload_type != payload_type:
            raise ParcelError("envelope: another payload type than the expected one")
        key.verify(self.signature, pae(self.payload_type, self.payload))
        return self.unverified()

    def unverified(self) -> dict[str, Any]:
        """The statement without looking at the signature: only for what we stored after `open`."""
        statement = canonical.decode(self.payload)
        if not isinstance(statement, dict):
            raise ParcelError("envelope: the statement is not an object")
        return statement


def _fields(value: Any, expected: set[str], where: str) -> None:
    if not isinstance(value, dict) or set(value) != expected:
        raise ParcelError(f"{where}: the fields must be exactly {', '.join(sorted(expected))}")
