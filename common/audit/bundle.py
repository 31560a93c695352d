"""The bundle: a folder with what an auditor needs, from one shore or from several.

    root.json                      whose keys count, as the exporting shore knows it
    shores/<name>/ledger.jsonl     a ledger, byte for byte; <name> is "server" or a domain
    shores/<name>/checkpoint       its newest checkpoint, a signed note
    parcels/<digest>.dsse          headers in their envelopes, named by the envelope's SHA-256
    receipts/<digest>.dsse         receipts
    checkpoints/<digest>.note      cosigned checkpoints of any ledger, whoever kept them
    rotations/<digest>.json        changes of keys
    payloads/<digest>              payloads, where they were asked for, named by their SHA-256

Every shore exports its own part (`isthmus audit bundle HOME --out DIR`); into the same folder they become one
bundle. Nothing in a bundle is trusted: `common.audit.verify` derives everything again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from common.checkpoints import CHECKPOINT, sign_checkpoint
from common.errors import ConfigError
from common.files import copy_hashed, sha256_bytes, storage_errors, write_atomic
from common.ledger import LINE_BYTES, Ledger
from common.notes import Signer
from common.statements import DIGEST_PATTERN, NAME_PATTERN

LEDGER, ROOT = "ledger.jsonl", "root.json"


class Bundle:
    """A bundle's folder. Raises ConfigError when there is no bundle at `path` (`create` makes one)."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if create:
            with storage_errors(path):
                (path / "shores").mkdir(parents=True, exist_ok=True)
        if not (path / "shores").is_dir():
            raise ConfigError(f"{path} is not a bundle", next_step="isthmus audit bundle HOME --out DIR")

    # What is in it

    def shores(self) -> list[str]:
        """Names of the shores whose ledgers are here; other folders are not looked at."""
        found = sorted(folder.name for folder in (self.path / "shores").iterdir() if folder.is_dir())
        return [name for name in found if re.fullmatch(NAME_PATTERN, name) and self.ledger(name).is_file()]

    def ledger(self, shore: str) -> Path:
        """The ledger of `shore`."""
        return self.path / "shores" / shore / LEDGER

    def checkpoint(self, shore: str) -> str | None:
        """The newest checkpoint of `shore` as text, or None."""
        data = _small_file(self.path / "shores" / shore / CHECKPOINT)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    def envelope(self, digest: str) -> bytes | None:
        """The parcel's envelope with this SHA-256, or None where it is missing or another one."""
        return self._read("parcels", digest)

    def receipt(self, digest: str) -> bytes | None:
        """The receipt with this SHA-256, or None."""
        return self._read("receipts", digest)

    def payload(self, digest: str) -> Path | None:
        """The payload of this name, or None where it is not here. It is not hashed here."""
        path = self.path / "payloads" / digest
        return path if re.fullmatch(DIGEST_PATTERN, digest) and path.is_file() else None

    def rotation(self, digest: str) -> bytes | None:
        """The change of keys with this SHA-256, or None."""
        return self._read("rotations", digest, "json")

    def notes(self) -> list[str]:
        """Every cosigned checkpoint, as text; one that is too long, or not a file, is left out as empty."""
        paths = sorted((self.path / "checkpoints").glob("*.note"))
        return [(_small_file(path) or b"").decode("utf-8", errors="replace") for path in paths]

    def _read(self, kind: str, digest: str, suffix: str = "dsse") -> bytes | None:
        data = _small_file(self.path / kind / f"{digest}.{suffix}")
        return data if data is not None and sha256_bytes(data) == digest else None

    # Putting in

    def put_ledger(self, shore: str, ledger: Ledger, signer: Signer) -> None:
        """Copy a ledger and sign a checkpoint of it as it is now. Raises StorageError."""
        with ledger.locked():
            note, content = sign_checkpoint(ledger, signer), ledger.snapshot()
        folder = self.path / "shores" / shore
        write_atomic(folder / LEDGER, content)
        write_atomic(folder / CHECKPOINT, str(note).encode())

    def put_envelopes(self, envelopes: Iterable[bytes]) -> None:
        """Add parcels' envelopes. Raises StorageError."""
        for envelope in envelopes:
            write_atomic(self.path / "parcels" / f"{sha256_bytes(envelope)}.dsse", envelope)

    def put_receipts(self, receipts: Iterable[bytes]) -> None:
        """Add receipts. Raises StorageError."""
        for receipt in receipts:
            write_atomic(self.path / "receipts" / f"{sha256_bytes(receipt)}.dsse", receipt)

    def put_rotations(self, rotations: Iterable[bytes]) -> None:
        """Add changes of keys. Raises StorageError."""
        for data in rotations:
            write_atomic(self.path / "rotations" / f"{sha256_bytes(data)}.json", data)

    def put_notes(self, notes: Iterable[str]) -> None:
        """Add cosigned checkpoints. Raises StorageError."""
        for note in notes:
            name = sha256_bytes(note.encode())
            write_atomic(self.path / "checkpoints" / f"{name}.note", note.encode())

    def put_payload(self, digest: str, source: Path) -> None:
        """Add a copy of a payload. Raises StorageError."""
        target = self.path / "payloads" / digest
        if not target.exists():
            copy_hashed(source, target)

    def put_root(self, data: bytes) -> None:
        """Add the root file as the exporting shore knows it. Raises StorageError."""
        write_atomic(self.path / ROOT, data)


def _small_file(path: Path) -> bytes | None:
    """What is in a file; None where there is none, or a folder, a pipe or a huge file under its name."""
    if not path.is_file() or path.stat().st_size > LINE_BYTES:
        return None
    return path.read_bytes()
