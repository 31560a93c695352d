"""The wire gate: what Flower's SuperNode says to the server passes here, on the owner's own host.

The SuperNode knows no other address. Each Fleet request is decoded and must be exactly what its protobuf
type says: no unknown field, no text that is not an identifier, no header that Flower does not need. A reply
goes through only if it is one that the egress gate released, field by field: its digest is in the ledger. No
other record passes, and no tensor. The text of Flower's own errors is replaced.

What passes, and what was refused, is in `wire.jsonl` of the owner's home before it is sent: call, size and
SHA-256 of the bytes on the wire. The ledger is not the place for it: the replies are there already, and the
other shore has no such entries. Heartbeats and polls, which hold a node's number alone and come every few
seconds, are checked and not written down.

    python -m clients.wire_gate HOME PORT
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.recorddict_pb2 import ConfigRecord
from flwr.proto.run_pb2 import GetRunRequest
from google.protobuf.message import DecodeError

from clients.home import ClientHome
from common import fleet
from common.errors import GateError
from common.files import sha256_bytes
from common.guard import check_imports
from common.ledger import AppendOnlyLog, Ledger
from common.statements import CODE_PATTERN
from common.tls import TlsFiles, create_ca, issue_server_certificate

log = logging.getLogger(__name__)
LOG = "wire.jsonl"
HOST = "127.0.0.1"
REQUESTS: dict[str, Any] = {
    "register-node": RegisterNodeFleetRequest,
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "unregister-node": UnregisterNodeFleetRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "push-messages": PushMessagesRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
    "push-object": PushObjectRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
}
POLLS = frozenset({"send-node-heartbeat", "pull-messages"})
HEADERS = frozenset({"content-type", "accept", "accept-encoding"})
IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{0,128}")
_CODE = re.compile(CODE_PATTERN)
_OBJECTS = 3  # of a reply: message, its dictionary of records, the one record


class WireGate:
    """A `common.fleet.Screen`: decides on each request and writes it down."""

    def __init__(self, ledger: Ledger, log: AppendOnlyLog, public_key: bytes) -> None:
        self._ledger, self._log, self._public_key = ledger, log, public_key
        self._without_text: dict[str, bytes] = {}  # object id at the SuperNode -> the object as it is sent
        self._known_as: dict[str, str] = {}  # its id then -> the id at the SuperNode

    def request(self, call: str, body: bytes) -> bytes:
        """The bytes to send in the place of `body`. Raises GateError, StorageError."""
        try:
            sent = self._screened(call, body)
        except GateError as err:
            log.warning("%s was refused: %s", call, err.message)
            self._record(call, body, "refused")
            raise
        if call not in POLLS:
            self._record(call, sent, "passed" if sent == body else "text-replaced")
        return sent

    def passes_header(self, name: str) -> bool:
        """Only what Flower's protocol needs."""
        return name in HEADERS or name.startswith("flwr-")

    def answer(self, call: str, content: bytes) -> bytes:
        """The server's answer, in terms of the objects that the SuperNode knows."""
        if call != "push-messages" or not self._known_as:
            return content
        answer = PushMessagesResponse.FromString(content)
        wanted = [self._known_as.get(name, name) for name in answer.objects_to_push]
        answer.ClearField("objects_to_push")
        answer.objects_to_push.extend(wanted)
        return bytes(answer.SerializeToString())

    def _screened(self, call: str, body: bytes) -> bytes:
        request = _decoded(REQUESTS[call], body)
        if call == "push-messages":
            self._check_push(request)
        elif call == "push-object":
            self._check_object(request)
        elif getattr(request, "public_key", self._public_key) != self._public_key:
            raise GateError("another node key than this owner's")
        for text in _texts(request):
            if not IDENTIFIER.fullmatch(text):
                raise GateError(f"{call}: a text that is no identifier")
        return bytes(request.SerializeToString(deterministic=True))

    def _check_push(self, request: Any) -> None:
        """Take the text out of errors; nothing but a reply's few objects may follow."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise GateError("push-messages: one message at a time")
        (message,), (tree,) = request.messages_list, request.message_object_trees
        if message.content.ByteSize() or sum(1 for _ in _nodes(tree)) > _OBJECTS:
            raise GateError("push-messages: more than a reply")
        if message.HasField("error") and not _is_code(message.error.reason):
            known_as = message.metadata.message_id
            message.error.reason = "error"
            body = Message()
            body.CopyFrom(message)
            body.metadata.message_id = ""
            content = _framed("Message", [], body.SerializeToString(deterministic=True))
            message.metadata.message_id = tree.object_id = sha256_bytes(content)
            self._without_text[known_as], self._known_as[tree.object_id] = content, known_as

    def _check_object(self, request: Any) -> None:
        """An object is a message without text, a dictionary of one reply, or a reply that was released."""
        if request.object_id in self._without_text:
            request.object_content = self._without_text[request.object_id]
            request.object_id = sha256_bytes(request.object_content)
        content = request.object_content
        head, _, body = content.partition(b"\0")
        kind, _, rest = head.decode("ascii", "replace").partition(" ")
        children = rest.rpartition(" ")[0].split(",")
        if request.object_id != sha256_bytes(content) or content != _framed(kind, children, body):
            raise GateError("push-object: not an object in its only form")
        if kind == "Message":
            message = _decoded(Message, body)
            fine = not message.HasField("content") and all(map(IDENTIFIER.fullmatch, _texts(message)))
            fine &= len(children) == 1 and _is_code(message.error.reason)
        elif kind == "RecordDict":
            fine = len(children) == 1 and body == json.dumps({"reply": children[0]}).encode()
        else:
            fine = kind == "ConfigRecord" and children == [""] and self._is_released(body)
        if not fine:
            raise GateError(f"push-object: {kind[:20]!r} is not part of a reply that the gate released")

    def _is_released(self, body: bytes) -> bool:
        record = _decoded(ConfigRecord, body)
        reply = {item.key: getattr(item.value, item.value.WhichOneof("value") or "") for item in record.items}
        try:
            digest = sha256_bytes(json.dumps(reply, sort_keys=True).encode())
        except TypeError:  # bytes or a list
            return False
        self._ledger.refresh()
        found = any(
            (entry.body["type"], entry.body["direction"], entry.body["digest"]) == ("message", "out", digest)
            for entry in self._ledger
        )
        return found and [item.key for item in record.items] == sorted(reply)

    def _record(self, call: str, body: bytes, verdict: str) -> None:
        entry = {
            "call": call,
            "digest": sha256_bytes(body),
            "size_bytes": len(body),
            "verdict": verdict,
            "time_s": int(time.time()),
        }
        self._log.append(entry)


def _decoded(kind: Any, body: bytes) -> Any:
    """Raises GateError unless `body` is a message of this type in its only form, without unknown fields."""
    try:
        message = kind.FromString(body)
    except DecodeError:
        raise GateError(f"not a {kind.__name__}") from None
    message.DiscardUnknownFields()
    if message.SerializeToString(deterministic=True) != body:
        raise GateError(f"a {kind.__name__} with more in it, or not in its only form")
    return message


def _texts(message: Any) -> Iterator[str]:
    """Every text in it, at any depth."""
    for field, value in message.ListFields():
        for part in value if field.is_repeated else [value]:
            if field.type == field.TYPE_STRING:
                yield part
            elif field.type == field.TYPE_MESSAGE:
                yield from _texts(part)


def _nodes(tree: ObjectTree) -> Iterator[ObjectTree]:
    yield tree
    for child in tree.children:
        yield from _nodes(child)


def _is_code(text: str) -> bool:
    return not text or _CODE.fullmatch(text) is not None


def _framed(kind: str, children: list[str], body: bytes) -> bytes:
    """An object as Flower sends it: type, ids of its children, length of its body; the body."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def certificates(home: ClientHome) -> TlsFiles:
    """This gate's own authority and certificate, for the SuperNode on this host; made anew at each `up`."""
    folder = home.keys / "wire"
    return issue_server_certificate(create_ca(folder), folder, [HOST], name="wire")


def public_key(home: ClientHome) -> bytes:
    """The Flower node's public key as it goes over the wire."""
    key = serialization.load_ssh_private_key((home.keys / "flower.key").read_bytes(), password=None)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def main(path: str, port: int) -> None:
    """Serve until the process is told to end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    check_imports()
    home = ClientHome(Path(path))
    folder = home.keys / "wire"
    screen = WireGate(home.ledger, AppendOnlyLog(home.path / LOG), public_key(home))
    app = fleet.build(f"https://{home.config.server.fleet}", home.keys / "ca.crt", screen=screen)
    fleet.serve(app, HOST, port, folder / "wire.crt", folder / "wire.key")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
