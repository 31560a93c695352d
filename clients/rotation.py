"""Going over to new keys: made here, sent signed by the old and the new one, and put in their place."""

from __future__ import annotations

from pathlib import Path

import grpc

from clients.home import ClientHome
from common.errors import ConfigError, SignatureError
from common.ledger import Crossing
from common.parcels import SERVER
from common.processes import listens
from common.rotation import Rotation
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import CALL_S, connect, raise_refused, translated


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
    if home.journal.get("rotation") != {"accepted": True}:
        _ask(home, home.rotation_to_new_keys())
        home.journal.put("rotation", {"accepted": True})
    home.take_new_keys()
    renewed = ClientHome(path)
    renewed.keep_checkpoint()
    renewed.journal.put("rotation", {"accepted": False})
    return renewed


def _ask(home: ClientHome, rotation: Rotation) -> None:
    home.gate.release_rotation(rotation)
    with connect(home.config.server.exchange, home.tls.ca, home.tls) as channel:
        try:
            request = pb.RotateRequest(rotation=rotation.data)
            reply = rpc.ExchangeStub(channel).Rotate(request, timeout=CALL_S)
        except grpc.RpcError as err:
            raise translated(err) from None
    if reply.WhichOneof("outcome") != "ledger_size":
        raise_refused(reply.refused)


def accept_server_keys(path: Path, data: bytes) -> ClientHome:
    """Pin the server's new keys, which the pinned one signed. Only the owner does this, by hand.

    Raises SignatureError or ParcelError when they are not the successors of the pinned key, StorageError.
    """
    home = ClientHome(path)
    keys, pinned = Rotation.open(data).keys, home.config.server
    if keys.shore != SERVER or keys.replaces != pinned.public_key:
        raise SignatureError(
            "these keys do not replace the pinned one",
            next_step="ask the operator for every rotation since this owner joined, and accept them in order",
        )
    home.keep_rotation(data)
    home.ledger.record_once(Crossing.of_keys("in", SERVER, data))
    server = pinned.model_copy(
        update={
            "public_key": keys.identity_key,
            "log_key": keys.log_key,
            "retired_log_keys": (pinned.log_key, *pinned.retired_log_keys),
        }
    )
    ClientHome.write_config(home.path, home.config.model_copy(update={"server": server}))
    return ClientHome(path)
