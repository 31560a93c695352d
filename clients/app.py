"""The ClientApp: turns one Flower message into one action of the owner, and the result into codes.

The owner's runner calls this installed object; the bundle that the server pushed is never unpacked.
Whatever goes wrong, only a code from `common.errors` leaves, never the text of an exception.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.actions import Actions
from clients.home import ClientHome
from common.errors import FederationError, IsthmusError, RefusedError, StorageError, TransportError
from common.files import sha256_bytes
from common.ledger import Crossing
from common.orders import ACTIONS, DONE, FAILED, REFUSED, Order
from common.parcels import SERVER

log = logging.getLogger(__name__)
HOME_VARIABLE = "ISTHMUS_CLIENT_HOME"

app = ClientApp()


def answer(home: ClientHome, actions: Actions, envelope: bytes) -> dict[str, str]:
    """Carry out one order. Never raises: every outcome is a status and a code."""
    try:
        order = Order.open(envelope, home.server_key, home.config.domain)
        home.ledger.record_once(
            Crossing(
                "in",
                "control",
                "message",
                sha256_bytes(envelope),
                len(envelope),
                SERVER,
                "message",
                order.run,
                "accepted",
            )
        )
        actions.carry_out(order, envelope)
    except (TransportError, StorageError, FederationError) as err:  # link, disk, killed trainer
        log.warning("%s", err)
        return {"status": FAILED, "code": err.code}
    except RefusedError as err:
        log.error("%s", err)  # noqa: TRY400 - the text is for the owner, and is complete
        return {"status": REFUSED, "code": err.reason}
    except IsthmusError as err:
        log.error("refused: %s", err)  # noqa: TRY400 - the text is for the owner, and is complete
        return {"status": REFUSED, "code": err.code}
    except Exception:
        log.exception("failed")
        return {"status": FAILED, "code": "internal"}
    return {"status": DONE, "code": "ok"}


def _handle(message: Message, _context: Context) -> Message:
    home = ClientHome(Path(os.environ[HOME_VARIABLE]))
    record = message.content.config_records.get("order", ConfigRecord())
    envelope = record.get("envelope", b"")
    if not isinstance(envelope, bytes):
        envelope = b""  # answered as the malformed order that it is
    reply = home.gate.release_reply(answer(home, Actions(home), envelope))
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


for _action in ACTIONS:
    app.query(_action)(_handle)
