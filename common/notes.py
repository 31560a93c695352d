"""Checkpoints of a log as signed notes, in the formats of C2SP, so that any witness can cosign them.

A note is text, an empty line and signature lines (c2sp.org/signed-note). A checkpoint is a note of three
lines: the log's origin, its size, its root in base64 (c2sp.org/tlog-checkpoint). The log signs it (type 1);
others who saw it grow consistently cosign it with the time at which they did (type 4, cosignature/v1,
c2sp.org/tlog-cosignature).

    >>> from common.signing import SigningKey
    >>> log, witness = Signer("example.org/log", SigningKey(bytes(32))), SigningKey(bytes([1]) * 32)
    >>> note = log.sign(Checkpoint("example.org/log", 0, EMPTY_ROOT).text())
    >>> cosigned = note.with_cosignature(Signer("witness", witness), time_s=1700000000)
    >>> cosigned.cosigned_by(Verifier("witness", witness.public))
    1700000000
    >>> Checkpoint.open(str(cosigned), Verifier("example.org/log", log.key.public)).size
    0

Only the first 4 bytes of a key's hash stand in a note; whoever verifies has the whole key. Lines of keys
that nobody asked about are kept and mean nothing. At most 16 signature lines and 64 KiB are read.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from common import canonical
from common.errors import ParcelError, ProofError, SignatureError
from common.merkle import EMPTY_ROOT, HASH_BYTES
from common.signing import PublicKey, SigningKey

MAX_BYTES = 1 << 16
MAX_SIGNATURES = 16
SIGNATURE, COSIGNATURE = 1, 4
_DASH = "\N{EM DASH} "
_SIZE = re.compile(r"0|[1-9][0-9]{0,15}")


def _key_hash(name: str, kind: int, key: PublicKey) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + key.raw).digest()[:4]


def _check_name(name: str) -> None:
    if not name or "+" in name or any(char.isspace() or not char.isprintable() for char in name):
        raise ProofError(f"{name[:40]!r}: a key's name has neither spaces nor plus signs")


@dataclass(frozen=True)
class Verifier:
    """A named public key. Its text form (`vkey`) is NAME+HASH+BASE64, of a signature or cosignature key."""

    name: str
    key: PublicKey

    def vkey(self, kind: int = SIGNATURE) -> str:
        """The verifier key as other tools read it."""
        encoded = base64.b64encode(bytes([kind]) + self.key.raw).decode()
        return f"{self.name}+{_key_hash(self.name, kind, self.key).hex()}+{encoded}"

    @classmethod
    def from_vkey(cls, text: str, kind: int = SIGNATURE) -> Verifier:
        """Raises ProofError unless `text` is exactly what `vkey` writes for an Ed25519 key."""
        name, _, rest = text.partition("+")
        _, _, encoded = rest.partition("+")
        _check_name(name)
        raw = _base64(encoded)
        found = cls(name, PublicKey(raw[1:]))
        if len(raw) != 33 or raw[0] != kind or found.vkey(kind) != text:
            raise ProofError(f"{name[:40]}: not a verifier key of type {kind}")
        return found


@dataclass(frozen=True)
class Signer:
    """A named private key."""

    name: str
    key: SigningKey

    def sign(self, text: str) -> Note:
        """A note with one signature. Raises ProofError when `text` cannot be a note."""
        _check_name(self.name)
        signature = _key_hash(self.name, SIGNATURE, self.key.public) + self.key.sign(text.encode())
        return Note.parse(f"{text}\n{_line(self.name, signature)}")


def _line(name: str, signature: bytes) -> str:
    return f"{_DASH}{name} {base64.b64encode(signature).decode()}\n"


@dataclass(frozen=True)
class Note:
    """A note and its signature lines as (name, key hash and signature); nothing in it is trusted yet."""

    text: str
    signatures: tuple[tuple[str, bytes], ...]

    def __str__(self) -> str:
        return self.text + "\n" + "".join(_line(*signature) for signature in self.signatures)

    @classmethod
    def parse(cls, note: str) -> Note:
        """Raises ProofError unless `note` has the form of a signed note, in the only way to write it."""
        if len(note.encode("utf-8", "replace")) > MAX_BYTES:
            raise ProofError(f"a note has at most {MAX_BYTES} bytes")
        if any((char < " " and char != "\n") or 0xD800 <= ord(char) < 0xE000 for char in note):
            raise ProofError("a note holds no control characters")
        body, found, lines = note.rpartition("\n\n")
        if not found or not body or not lines.endswith("\n"):
            raise ProofError("a note is text, an empty line and signature lines")
        signatures = []
        for line in lines[:-1].split("\n"):
            name, _, encoded = line.removeprefix(_DASH).partition(" ")
            _check_name(name)
            raw = _base64(encoded)
            if not line.startswith(_DASH) or len(raw) < 5:
                raise ProofError("a signature line is a dash, a name and base64")
            signatures.append((name, raw))
        if len(signatures) > MAX_SIGNATURES:
            raise ProofError(f"a note has at most {MAX_SIGNATURES} signatures")
        return cls(body + "\n", tuple(signatures))

    def verify(self, verifier: Verifier) -> None:
        """Raises SignatureError unless the note carries this key's signature."""
        for raw in self._of(verifier, SIGNATURE):
            verifier.key.verify(raw, self.text.encode())
            return
        raise SignatureError(f"the note is not signed by {verifier.name}")

    def only(self, verifier: Verifier) -> Note:
        """The note with this key's signature alone. Raises SignatureError when it is not there."""
        self.verify(verifier)
        key_hash = _key_hash(verifier.name, SIGNATURE, verifier.key)
        kept = [one for one in self.signatures if one[0] == verifier.name and one[1][:4] == key_hash]
        return Note(self.text, tuple(kept[:1]))

    def cosigned_by(self, verifier: Verifier) -> int:
        """When this key cosigned the note (Unix seconds). Raises SignatureError when it did not."""
        for raw in self._of(verifier, COSIGNATURE):
            time_s = int.from_bytes(raw[:8], "big")
            verifier.key.verify(raw[8:], self._cosigned(time_s))
            return time_s
        raise SignatureError(f"the note is not cosigned by {verifier.name}")

    def with_cosignature(self, signer: Signer, *, time_s: int) -> Note:
        """The note with one more cosignature, in place of an earlier one by the same key."""
        _check_name(signer.name)
        key_hash = _key_hash(signer.name, COSIGNATURE, signer.key.public)
        raw = key_hash + time_s.to_bytes(8, "big") + signer.key.sign(self._cosigned(time_s))
        return self._with((signer.name, raw))

    def _with(self, signature: tuple[str, bytes]) -> Note:
        same = (signature[0], signature[1][:4])
        kept = tuple(old for old in self.signatures if (old[0], old[1][:4]) != same)
        return Note.parse(str(Note(self.text, (*kept, signature))))

    def _of(self, verifier: Verifier, kind: int) -> list[bytes]:
        key_hash = _key_hash(verifier.name, kind, verifier.key)
        return [raw[4:] for name, raw in self.signatures if name == verifier.name and raw[:4] == key_hash]

    def _cosigned(self, time_s: int) -> bytes:
        return f"cosignature/v1\ntime {time_s}\n{self.text}".encode()


@dataclass(frozen=True)
class Checkpoint:
    """Origin, size and root (32 bytes) of a log at one moment."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The body of the note, three lines."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def read(cls, text: str) -> Checkpoint:
        """Raises ProofError unless `text` is a checkpoint without extension lines, in canonical form."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise ProofError("a checkpoint is three lines: origin, size, root")
        root = _base64(lines[2])
        if not lines[0] or not _SIZE.fullmatch(lines[1]) or len(root) != HASH_BYTES:
            raise ProofError("a checkpoint is an origin, a size and a root of 32 bytes")
        found = cls(lines[0], int(lines[1]), root)
        if found.size == 0 and found.root != EMPTY_ROOT:
            raise ProofError("a log of size 0 has the empty root")
        return found

    @classmethod
    def open(cls, note: str, verifier: Verifier) -> Checkpoint:
        """The checkpoint in a note that `verifier`'s key signed for its own log.

        Raises SignatureError, or ProofError when it is no checkpoint or another log's.
        """
        parsed = Note.parse(note)
        parsed.verify(verifier)
        found = cls.read(parsed.text)
        if found.origin != verifier.name:
            raise ProofError(f"the checkpoint is of {found.origin[:80]!r}, not of {verifier.name!r}")
        return found


def _base64(text: str) -> bytes:
    try:
        return canonical.decode_base64(text)
    except ParcelError as err:
        raise ProofError(err.message) from None
