"""Watching the ledgers: this owner cosigns the server's, and has its own cosigned by others."""

from __future__ import annotations

from typing import Any

import grpc

from clients.home import ClientHome
from common.errors import ProofError
from common.ledger import Crossing
from common.merkle import HASH_BYTES
from common.parcels import SERVER
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import CALL_S, connect, translated
from common.witness.client import ask_witnesses, submit


def exchange_checkpoints(home: ClientHome) -> None:
    """Cosign the server's ledger as it is now, and have ours cosigned by the server and by every witness.

    A witness that cannot be reached is logged and left. Raises ProofError when the server's ledger has not
    grown from what this owner saw of it, LedgerError when somebody saw more of ours than there is,
    TransportError, RefusedError, StorageError.
    """
    with connect(home.config.server.exchange, home.tls.ca, home.tls) as channel:
        cosigned = _cosign_server(home, channel)
        submit(home, channel, home.server_logs[0], SERVER, home.gate.release_checkpoint, cosigned)
    ask_witnesses(home, home.gate.release_checkpoint)


def _cosign_server(home: ClientHome, channel: Any) -> str:
    known = home.cosigner.latest(SERVER, *home.server_logs)
    try:
        request = pb.GetCheckpointRequest(since=known.size)
        reply = rpc.LogStub(channel).GetCheckpoint(request, timeout=CALL_S)
    except grpc.RpcError as err:
        raise translated(err) from None
    size = len(reply.note.encode()) + HASH_BYTES * len(reply.proof)
    home.ledger.record(Crossing.of_checkpoint("in", SERVER, reply.note, size))
    try:
        note = home.cosigner.cosign(SERVER, home.server_logs, reply.note, known.size, list(reply.proof))
    except ProofError as err:
        raise ProofError(
            f"the server's ledger has not grown from the {known.size} entries seen before: {err.message}",
            next_step="send nothing more; keep this home as it is and show it to an auditor",
        ) from None
    return str(note)
