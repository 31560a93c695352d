"""Cosigning: whoever has seen a log grow says so, with a date, under the log's own checkpoint.

A cosigner keeps, for each log, the newest checkpoint that it signed. It signs the next one only with a proof
that the log has grown from there (RFC 9162, 2.1.4), so that a log which shows two histories needs every
cosigner's help to hide it (c2sp.org/tlog-witness, c2sp.org/tlog-cosignature).

Both shores cosign each other's ledgers, and so do independent witnesses (`common.witness`). A shore uses its
log key: what that signs as a log begins with the log's origin, what it cosigns with `cosignature/v1`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import LedgerError, ProofError
from common.files import write_atomic
from common.merkle import EMPTY_ROOT, verify_consistency
from common.notes import Checkpoint, Note, Signer, Verifier


class StaleError(ProofError):
    """The proof begins at another size than the one cosigned last, which is `known_size`."""

    code = "stale"

    def __init__(self, known_size: int) -> None:
        super().__init__(f"the checkpoint of size {known_size} was cosigned last: prove from there")
        self.known_size = known_size


class Cosigner:
    """Cosigns with `signer`; the newest note of each log is kept in `folder` under the shore's name.

    One process at a time may cosign in a folder; its threads may share one `Cosigner`.
    """

    def __init__(self, folder: Path, signer: Signer, *, clock: Callable[[], float] = time.time) -> None:
        self.signer = signer
        self._folder, self._clock = folder, clock
        self._guard = threading.Lock()

    def latest(self, shore: str, *logs: Verifier) -> Checkpoint:
        """What was cosigned last of `shore`'s log: of size 0 if nothing was. Raises LedgerError (damaged).

        `logs` are its log's key, and those that it had before.
        """
        path = self._folder / shore
        if not path.exists():
            return Checkpoint(logs[0].name, 0, EMPTY_ROOT)
        note = self._kept(path)
        origin = Checkpoint.read(note.text).origin
        for log in logs:
            if log.name == origin:
                return Checkpoint.open(str(note), log)
        raise LedgerError(
            f"{path}: a checkpoint of another log than {logs[0].name}",
            next_step="restore it from a copy; without it a rewritten log would pass",
        )

    def hand_over(self, signer: Signer) -> None:
        """Have everything that was cosigned cosigned by `signer`, too, which takes this one's place.

        Raises LedgerError (damaged), StorageError.
        """
        for path in sorted(self._folder.glob("[!.]*")):
            note = self._kept(path).with_cosignature(signer, time_s=int(self._clock()))
            write_atomic(path, str(note).encode())

    def _kept(self, path: Path) -> Note:
        try:
            note = Note.parse(path.read_text(encoding="utf-8"))
            note.cosigned_by(Verifier(self.signer.name, self.signer.key.public))
        except (ValueError, LedgerError) as err:
            raise LedgerError(
                f"{path}: not a checkpoint that was cosigned here ({err})",
                next_step="restore it from a copy; without it a rewritten log would pass",
            ) from None
        return note

    def cosign(
        self, shore: str, logs: Sequence[Verifier], note: str, old_size: int, proof: Sequence[bytes]
    ) -> Note:
        """`note`, the newest checkpoint of `logs[0]`, with a cosignature that is kept before it is returned.

        `proof` shows that it has grown from what was cosigned last, of `old_size`. Raises StaleError,
        SignatureError, ProofError (not a checkpoint, or of another history), StorageError, LedgerError.
        """
        with self._guard:
            offered, known = Checkpoint.open(note, logs[0]), self.latest(shore, *logs)
            if old_size != known.size or offered.size < known.size:
                raise StaleError(known.size)
            verify_consistency(known.size, offered.size, proof, known.root, offered.root)
            cosigned = Note.parse(note).only(logs[0]).with_cosignature(self.signer, time_s=int(self._clock()))
            write_atomic(self._folder / shore, str(cosigned).encode())
            return cosigned
