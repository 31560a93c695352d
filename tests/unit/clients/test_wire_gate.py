"""The wire gate between a SuperNode that says what it likes and a server that remembers what reached it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clients.wire_gate import POLLS, REQUESTS, WireGate
from common import fleet
from common.files import sha256_bytes
from common.ledger import AppendOnlyLog, Crossing, Ledger

EMAIL = "jane.doe@example.com"
KEY = b"the node's own public key"
NODE = Node(node_id=7)


class Setting:
    """A gate in front of a server that keeps every body and answers `push-messages` as Flower does."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.log = AppendOnlyLog(folder / "wire.jsonl")
        self.gate = WireGate(self.ledger, self.log, KEY)
        self.reached: list[tuple[str, bytes, dict[str, str]]] = []
        self.upstream = Starlette(routes=[Route("/v1/fleet/{call}", self.take, methods=["POST"])])

    async def take(self, request: Request) -> Response:
        call, body = request.path_params["call"], await request.body()
        assert len(self.log) or call in POLLS  # written down before it is sent
        self.reached.append((call, body, dict(request.headers)))
        if call != "push-messages":
            return Response(b"")
        tree = PushMessagesRequest.FromString(body).message_object_trees[0]
        answer = PushMessagesResponse(objects_to_push=[tree.object_id], session_id="s1")
        return Response(answer.SerializeToString())

    def post(self, call: str, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.upstream)
            app = fleet.build("https://server.test:1", Path("unused"), transport, self.gate)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://gate.test") as client,
            ):
                return await client.post(f"/v1/fleet/{call}", content=body, headers=headers)

        return asyncio.run(go())

    def say(self, call: str, request: Any) -> int:
        return self.post(call, request.SerializeToString(deterministic=True)).status_code

    def written(self) -> list[tuple[str, str]]:
        return [(entry.body["call"], entry.body["verdict"]) for entry in self.log]

    def release(self, reply: dict[str, Any]) -> None:
        """What `EgressGate.release_reply` leaves in the ledger."""
        content = json.dumps(reply, sort_keys=True).encode()
        digest = sha256_bytes(content)
        self.ledger.record(
            Crossing("out", "control", "message", digest, len(content), "server", "message", "")
        )


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them in a process that makes messages
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Setting(tmp_path)


def order() -> Message:
    message = Message(RecordDict({"order": ConfigRecord({"envelope": b"x"})}), 7, "query.contribute")
    message.metadata.__dict__.update(_run_id=5, _message_id="ab" * 32, _src_node_id=1)
    return message


def reply_of(content: RecordDict | Error) -> Message:
    message = Message(content, reply_to=order())
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def pushed(message: Message) -> PushMessagesRequest:
    """As Flower's SuperNode makes it."""
    return PushMessagesRequest(
        node=NODE,
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
        clientapp_runtime_list=[1.5],
    )


def objects(message: Message) -> list[PushObjectRequest]:
    return [
        PushObjectRequest(
            node=NODE, run_id=5, object_id=name, object_content=found.deflate(), session_id="s1"
        )
        for name, found in get_all_nested_objects(message).items()
    ]


def test_a_released_reply_passes_object_by_object(setting: Setting) -> None:
    reply = {"code": "ok", "round": 1, "share": 0.25, "status": "done"}
    setting.release(reply)
    message = reply_of(RecordDict({"reply": ConfigRecord(reply)}))  # type: ignore[dict-item]
    assert setting.say("push-messages", pushed(message)) == 200
    assert [setting.say("push-object", request) for request in objects(message)] == [200, 200, 200]
    assert setting.written() == [("push-messages", "passed")] + [("push-object", "passed")] * 3
    for entry, (_, body, _) in zip(setting.log, setting.reached, strict=True):
        assert entry.body["digest"] == sha256_bytes(body)
        assert entry.body["size_bytes"] == len(body)
    sent = PushObjectRequest.FromString(setting.reached[1][1])
    assert b"done" in sent.object_content


@pytest.mark.parametrize(
    "records",
    [
        {"reply": ConfigRecord({"code": "ok", "status": "failed"})},  # not the one that was released
        {"reply": ConfigRecord({"code": "ok", "status": "done", "text": EMAIL})},
        {"reply": ConfigRecord({"status": "done", "code": "ok"})},  # the order says something, too
        {"reply": ConfigRecord({"code": "ok", "status": b"done"})},
        {"reply": ConfigRecord({"code": "ok", "status": ["done"]})},
        {"other": ConfigRecord({"code": "ok", "status": "done"})},
        {"reply": ConfigRecord({"code": "ok", "status": "done"}), "more": ConfigRecord({"users": 5})},
    ],
)
def test_what_the_egress_gate_did_not_release_does_not_pass(
    setting: Setting, records: dict[str, Any]
) -> None:
    setting.release({"code": "ok", "status": "done"})
    message = reply_of(RecordDict(records))
    assert 403 in [
        setting.say("push-messages", pushed(message)),
        *(setting.say("push-object", o) for o in objects(message)),
    ]
    assert EMAIL not in str(setting.reached)
    assert "refused" in [verdict for _, verdict in setting.written()]


def test_tensors_and_metrics_never_pass(setting: Setting) -> None:
    import numpy as np
    from flwr.app import ArrayRecord, MetricRecord

    message = reply_of(RecordDict({"reply": MetricRecord({"loss": 0.5}), "w": ArrayRecord([np.ones(4)])}))
    assert setting.say("push-messages", pushed(message)) == 403
    answers = {
        request.object_content.split(b" ")[0]: setting.say("push-object", request)
        for request in objects(message)
    }
    assert answers.pop(b"Message") == 200  # ids and times alone
    assert set(answers) >= {b"RecordDict", b"MetricRecord", b"ArrayRecord", b"Array"}
    assert set(answers.values()) == {403}


def test_the_text_of_an_error_is_replaced(setting: Setting) -> None:
    message = reply_of(Error(2, f"ValueError: no such user {EMAIL}"))
    answer = setting.post("push-messages", pushed(message).SerializeToString(deterministic=True))
    assert list(PushMessagesResponse.FromString(answer.content).objects_to_push) == [message.object_id]
    (request,) = objects(message)
    assert setting.say("push-object", request) == 200
    (_, first, _), (_, second, _) = setting.reached
    assert EMAIL.encode() not in first + second
    push, sent = PushMessagesRequest.FromString(first), PushObjectRequest.FromString(second)
    assert (push.messages_list[0].error.code, push.messages_list[0].error.reason) == (2, "error")
    assert push.messages_list[0].metadata.message_id == sent.object_id == sha256_bytes(sent.object_content)
    assert push.message_object_trees[0].object_id == sent.object_id
    inflated = Message.inflate(sent.object_content)
    assert (inflated.error.code, inflated.error.reason) == (2, "error")
    assert setting.written() == [("push-messages", "text-replaced"), ("push-object", "text-replaced")]


def test_the_object_of_an_error_does_not_pass_on_its_own(setting: Setting) -> None:
    (request,) = objects(reply_of(Error(2, EMAIL)))
    assert setting.say("push-object", request) == 403
    (request,) = objects(reply_of(Error(2, "crashed")))
    assert setting.say("push-object", request) == 200


def test_more_than_the_type_says_is_refused(setting: Setting) -> None:
    poll = PullMessagesRequest(node=NODE).SerializeToString(deterministic=True)
    assert setting.post("pull-messages", poll).status_code == 200
    hidden = b"\xfa\x7f" + bytes([len(EMAIL)]) + EMAIL.encode()  # field 2047, unknown to Flower
    for call, body in (
        ("pull-messages", poll + hidden),
        ("pull-messages", poll + poll),  # the same field twice: another form of the same message
        ("send-node-heartbeat", b"\xff"),
        ("get-run", PullMessagesRequest(node=NODE, message_ids=[EMAIL]).SerializeToString()),
        ("get-fab", MessageProto(error={"reason": EMAIL}).SerializeToString()),
    ):
        assert setting.post(call, body).status_code == 403, call
    assert setting.say("pull-messages", PullMessagesRequest(node=NODE, message_ids=[EMAIL])) == 403
    assert setting.say("activate-node", ActivateNodeRequest(public_key=EMAIL.encode())) == 403
    assert setting.say("activate-node", ActivateNodeRequest(public_key=KEY, heartbeat_interval=30)) == 200
    assert [call for call, _, _ in setting.reached] == ["pull-messages", "activate-node"]
    assert EMAIL not in (setting.log.path).read_text()


def test_polls_are_not_written_down_and_refusals_are(setting: Setting) -> None:
    assert setting.say("pull-messages", PullMessagesRequest(node=NODE)) == 200
    assert (
        setting.say("send-node-heartbeat", SendNodeHeartbeatRequest(node=NODE, heartbeat_interval=30)) == 200
    )
    assert setting.written() == []
    assert setting.say("get-run", GetRunRequest(node=NODE, run_id=5)) == 200
    assert setting.post("pull-messages", b"\xff").status_code == 403
    assert setting.written() == [("get-run", "passed"), ("pull-messages", "refused")]


def test_headers_that_flower_does_not_need_end_here(setting: Setting) -> None:
    body = GetRunRequest(node=NODE, run_id=5).SerializeToString(deterministic=True)
    sent = {"flwr-signature": "abc", "content-type": "application/protobuf", "x-note": EMAIL, "cookie": EMAIL}
    assert setting.post("get-run", body, sent).status_code == 200
    (_, _, headers) = setting.reached[0]
    assert headers["flwr-signature"] == "abc"
    assert EMAIL not in str(headers)
    assert {name for name in sent if name in headers} == {"flwr-signature", "content-type"}


def test_what_cannot_be_written_down_is_not_sent(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.errors import StorageError

    def full(_body: Any) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(setting.log, "append", full)
    assert setting.say("get-run", GetRunRequest(node=NODE, run_id=5)) == 503
    assert setting.reached == []


def test_the_types_are_those_of_the_installed_flower() -> None:
    assert set(REQUESTS) == fleet.FLEET_CALLS
    source = Path(fleet_http_client.__file__).read_text()
    for call, kind in REQUESTS.items():
        before, _, _ = source.partition(f'"/v1/fleet/{call}"')
        assert kind.__name__ in before[-600:], call


def test_a_message_with_its_content_in_it_is_refused(setting: Setting) -> None:
    message = reply_of(RecordDict({"reply": ConfigRecord({"code": "ok", "status": "done"})}))
    request = pushed(message)
    request.messages_list[0].CopyFrom(message_to_proto(message))
    assert setting.say("push-messages", request) == 403
    assert setting.reached == []
