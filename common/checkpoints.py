"""Signed checkpoints beside a ledger: what the ledger was at least, so that it cannot quietly become less.

A crash may cut the last line of a ledger short; no crash takes away what a checkpoint covers. So a ledger
that is shorter than its checkpoint, or another one, is not opened.

    checkpoint           the newest, signed by this home's log key
    checkpoints/NAME     the newest that NAME cosigned: the other shore, or a witness
    cosigned/SHORE       the newest of another shore's ledger that this home cosigned (`common.cosigning`)
    rotations/           changes of keys, one's own or those of members (`common.rotation`)
    witnesses/NAME.json  the witnesses that are asked (`common.witness.card`)
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from common.cosigning import Cosigner
from common.errors import IsthmusError, LedgerError
from common.files import fsync_folder, sha256_bytes, write_atomic
from common.ledger import Ledger
from common.notes import Checkpoint, Note, Signer, Verifier
from common.roots import log_origin
from common.rotation import Rotation
from common.signing import SigningKey

CHECKPOINT = "checkpoint"
KEYS = ("identity.key", "log.key")


class LedgerHome:
    """What both shores' homes have: `ledger.jsonl`, a checkpoint beside it, and the key that signs it."""

    path: Path

    @property
    def shore(self) -> str:
        """Whose ledger it is: "server", or the domain."""
        raise NotImplementedError

    @cached_property
    def log_signer(self) -> Signer:
        """Signs the checkpoints of this shore's ledger."""
        key = SigningKey.load(self.path / "keys" / "log.key")
        return Signer(log_origin(self.shore, key.public), key)

    @cached_property
    def ledger(self) -> Ledger:
        """Every parcel, receipt and control message. Raises LedgerError if some of it is gone."""
        ledger = Ledger(self.path / "ledger.jsonl")
        if (self.path / CHECKPOINT).exists():
            check_against(ledger, self.path / CHECKPOINT, self.log_signer)
        return ledger

    @cached_property
    def cosigner(self) -> Cosigner:
        """Cosigns the other shore's checkpoints."""
        return Cosigner(self.path / "cosigned", self.log_signer)

    def cosigned_path(self, by: str) -> Path:
        """Where the newest checkpoint of this ledger that `by` cosigned is kept."""
        return self.path / "checkpoints" / by.replace("/", ".")  # no shore has a dot in its name

    def notes(self) -> list[str]:
        """Every checkpoint that is kept here, of this ledger and of others."""
        folders = (self.path / "checkpoints", self.path / "cosigned")
        return [
            path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("[!.]*"))
        ]

    def rotation_to_new_keys(self) -> Rotation:
        """A change to keys that wait in `keys/next`, made there unless they are; kept for whoever audits.

        What was cosigned here is cosigned with the new log key, too. Raises StorageError, LedgerError.
        """
        new, log = (SigningKey.ensure(self.path / "keys" / "next" / name) for name in KEYS)
        old = SigningKey.load(self.path / "keys" / KEYS[0])
        rotation = Rotation.make(self.shore, old, new, log.public)
        self.keep_rotation(rotation.data)
        self.cosigner.hand_over(Signer(log_origin(self.shore, log.public), log))
        return rotation

    def take_new_keys(self) -> None:
        """Put the waiting keys in the place of the old ones; open the home anew afterwards.

        Safe to repeat after a crash. The ledger was held against its checkpoint just now, which is of the
        old log key and goes away: sign the next one at once.
        """
        self.ledger.refresh()
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        keys = self.path / "keys"
        for name in KEYS:
            if (keys / "next" / name).exists():
                (keys / "next" / name).replace(keys / name)
        fsync_folder(keys)

    def keep_rotation(self, data: bytes) -> None:
        """Keep a change of keys for whoever audits. Raises StorageError."""
        write_atomic(self.path / "rotations" / f"{sha256_bytes(data)}.json", data)

    def rotations(self) -> list[bytes]:
        """Every change of keys that went through here."""
        return [path.read_bytes() for path in sorted((self.path / "rotations").glob("*.json"))]

    def keep_checkpoint(self) -> None:
        """Sign what the ledger is now; from now on it cannot become less. Raises StorageError."""
        keep_checkpoint(self.ledger, self.log_signer, self.path / CHECKPOINT)


def sign_checkpoint(ledger: Ledger, signer: Signer) -> Note:
    """A checkpoint of `ledger` as it is now."""
    with ledger.locked():
        head = ledger.tree_head()
    return signer.sign(Checkpoint(signer.name, head.size, bytes.fromhex(head.root)).text())


def keep_checkpoint(ledger: Ledger, signer: Signer, path: Path) -> None:
    """Write a checkpoint of `ledger` as it is now to `path`. Raises StorageError."""
    write_atomic(path, str(sign_checkpoint(ledger, signer)).encode())


def check_against(ledger: Ledger, path: Path, signer: Signer) -> None:
    """Raises LedgerError unless `ledger` is, or has grown from, the one of the checkpoint at `path`."""
    try:
        note = path.read_text(encoding="utf-8")
        kept = Checkpoint.open(note, Verifier(signer.name, signer.key.public))
    except (IsthmusError, UnicodeDecodeError) as err:
        raise LedgerError(
            f"{path}: not a checkpoint that this home signed ({err})", next_step="restore it from a copy"
        ) from None
    ledger.refresh()  # the checkpoint may be newer than what was read of the ledger
    if kept.size > len(ledger):
        what = f"{len(ledger)} entries, and {kept.size} were signed: some are gone"
    elif ledger.tree_head(kept.size).root != kept.root.hex():
        what = f"its first {kept.size} entries are not those that were signed"
    else:
        return
    raise LedgerError(
        f"{ledger.path}: {what}",
        next_step="restore the file from a copy; a ledger must never shrink or change",
    )
