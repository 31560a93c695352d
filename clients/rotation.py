"""Going over to new keys: made here, sent signed by the old and the new one, and put in their place."""

from __future__ import annotations

from pathlib import Path

import grpc

from clients.home import ClientHome
from common.checkpoints import CHECKPOINT
from common.errors import ConfigError
from common.files import fsync_folder
from common.notes import Signer
from common.processes import listens
from common.roots import log_origin
from common.rotation import Rotation
from common.signing import SigningKey
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import CALL_S, connect, raise_refused, translated

NAMES = ("identity.key", "log.key")


def rotate(path: Path) -> ClientHome:
    """Give the owner at `path` a new identity and log key. Safe to repeat after a crash or a broken link.

    Raises ConfigError while the owner's processes run or an order is unfinished, RefusedError,
    TransportError, StorageError.
    """
    home = ClientHome(path)
    if listens("127.0.0.1", home.config.supernode_port):
        raise ConfigError("this owner's processes run", next_step="end isthmus client up first")
    if any(not fact["done"] for _, fact in home.journal.items("order/")):
        raise ConfigError(
            "an order is unfinished, and what it sent was signed with the old key",
            next_step="isthmus client up until it is idle",
        )
    waiting = home.keys / "next"
    if home.journal.get("rotation") != {"accepted": True}:
        new, log = (SigningKey.ensure(waiting / name) for name in NAMES)
        _ask(home, Rotation.make(home.config.domain, SigningKey.load(home.keys / NAMES[0]), new, log.public))
        home.cosigner.hand_over(Signer(log_origin(home.config.domain, log.public), log))
        home.journal.put("rotation", {"accepted": True})
    (path / CHECKPOINT).unlink(missing_ok=True)  # by the old log key; the ledger was held against it just now
    for name in NAMES:
        if (waiting / name).exists():
            (waiting / name).replace(home.keys / name)
    fsync_folder(home.keys)
    renewed = ClientHome(path)
    renewed.keep_checkpoint()
    renewed.journal.put("rotation", {"accepted": False})
    return renewed


def _ask(home: ClientHome, rotation: Rotation) -> None:
    home.gate.release_rotation(rotation)
    home.keep_rotation(rotation.data)
    with connect(home.config.server.exchange, home.tls.ca, home.tls) as channel:
        try:
            request = pb.RotateRequest(rotation=rotation.data)
            reply = rpc.ExchangeStub(channel).Rotate(request, timeout=CALL_S)
        except grpc.RpcError as err:
            raise translated(err) from None
    if reply.WhichOneof("outcome") != "ledger_size":
        raise_refused(reply.refused)
