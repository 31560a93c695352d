"""The one place that touches Flower's private Runtime API on the owner's side.

With `--isolation process` a SuperNode starts no client code. The owner's own runner acquires each
task here, gets the message and the bytes of the FAB (to hash, never to unpack), and pushes a reply.
The contract test in tests/integration holds these calls to the pinned Flower version.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_to_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


@dataclass
class Task:
    """One message that the server addressed to this node, with the identity of the app it belongs to."""

    message: Message
    context: Context
    fab_sha256: str
    _client: RuntimeHttpClient
    _heartbeat: HeartbeatSender

    def reply(self, message: Message) -> None:
        """Push the reply and close the task as completed."""
        try:
            push_message(self._client, message, self.context)
            self._finish(SubStatus.COMPLETED)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the heartbeat and the connection; an unanswered task then counts as failed."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()

    def _finish(self, status: str) -> None:
        self._client.PushTaskOutput(
            PushTaskOutputRequest(context=context_to_proto(self.context), sub_status=status, details="")
        )


class TaskSource:
    """Acquires tasks from the SuperNode on this host's loopback with the owner's shared secret."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        self._client = self._connect(
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE})),
            ]
        )

    def acquire(self) -> Task | None:
        """The oldest waiting task, or None."""
        response = self._client.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP], agentapp_fab_hashes=[])
        )
        if not (response.HasField("task") and response.token):
            return None
        client = self._connect(
            [
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                RuntimeTokenHttpInterceptor(response.token),
            ]
        )
        heartbeat = HeartbeatSender(_beat(client))
        heartbeat.start()
        try:
            message, context, _run, fab = pull_task_input(client)
        except BaseException:
            heartbeat.stop()
            client.close()
            raise
        return Task(message, context, hashlib.sha256(fab.content).hexdigest(), client, heartbeat)

    def close(self) -> None:
        """Close the connection to the SuperNode."""
        self._client.close()

    def _connect(self, interceptors: list[Any]) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,
            root_certificates=None,
            interceptors=interceptors,
            retry_invoker=_patient(),
        )


def _beat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """One heartbeat of a task, which never fails.

    Flower's own sends this process SIGINT when the SuperNode no longer knows the task (it was started
    anew, or the Flower run is over). That would end a fine-tuning which counts all the same.
    """

    def beat() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        return True

    return beat


def _patient() -> RetryInvoker:
    """Flower's retries, but what is unauthorised or over is an error of that one call.

    Flower's own sends this process SIGINT for 401 and raises a BaseException for 403.
    """
    retries = make_simple_http_retry_invoker()
    gives_up = retries.should_giveup

    def refused_or_given_up(err: Exception) -> bool:
        refused = isinstance(err, httpx.HTTPStatusError) and err.response.status_code in (401, 403)
        return refused or gives_up is None or bool(gives_up(err))

    retries.should_giveup = refused_or_given_up
    return retries
