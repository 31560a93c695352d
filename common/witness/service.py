"""The `Witness` service: gRPC around `Cosigner`, for whoever knows which logs there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from common.cosigning import Cosigner, StaleError
from common.errors import LedgerError, ParcelError, RefusedError, StorageError
from common.notes import Checkpoint, Note, Verifier
from common.wire import exchange_pb2 as pb
from common.wire.serving import no_text

FindLog = Callable[[str], tuple[str, Sequence[Verifier]]]
"""Whose log has this origin: shore, and verifiers of its key and its earlier ones. Raises RefusedError."""


def add_checkpoint(cosigner: Cosigner, find_log: FindLog, request: Any) -> Any:
    """The reply to `AddCheckpoint`."""
    try:
        origin = Checkpoint.read(Note.parse(request.note).text).origin
        shore, logs = find_log(origin)
        note = cosigner.cosign(shore, logs, request.note, request.old_size, list(request.proof))
    except StaleError as err:
        return pb.AddCheckpointReply(known_size=err.known_size)
    except RefusedError as err:
        return pb.AddCheckpointReply(refused=pb.Refused(reason=err.reason, text=err.message))
    except (ParcelError, LedgerError) as err:
        return pb.AddCheckpointReply(refused=pb.Refused(reason=err.code, text=err.message))
    except StorageError:
        return pb.AddCheckpointReply(refused=pb.Refused(reason="storage", text="the disk is full"))
    return pb.AddCheckpointReply(cosigned=str(note))


class WitnessService:
    """The two calls of `Witness`, for an independent witness."""

    def __init__(self, cosigner: Cosigner, find_log: FindLog, update_root: Callable[[bytes], int]) -> None:
        self._cosigner, self._find_log, self._update_root = cosigner, find_log, update_root

    def AddCheckpoint(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Cosign a log that has grown."""
        with no_text(context):
            return add_checkpoint(self._cosigner, self._find_log, request)

    def UpdateRoot(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Trust the next root file; empty only asks for the version."""
        with no_text(context):
            try:
                return pb.UpdateRootReply(version=self._update_root(request.root))
            except ParcelError as err:
                return pb.UpdateRootReply(refused=pb.Refused(reason=err.code, text=err.message))
