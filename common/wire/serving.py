"""A running gRPC service, and how a call of it may end: what the Exchange and witnesses share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from common.errors import FederationError

log = logging.getLogger(__name__)
WORKERS = 32
OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
Adder = Callable[[Any, Any], None]


class Serving:
    """A running service; use as a context manager, or `stop` it."""

    def __init__(self, server: Any, port: int, service: Any) -> None:
        self._server = server
        self.port = port
        self.service = service

    def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, give running ones `grace_s`, and return when all threads are done."""
        self._server.stop(grace_s).wait()

    def wait(self) -> None:
        """Block until stopped."""
        self._server.wait_for_termination()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0)


def start(services: Sequence[tuple[Any, Adder]], address: str, credentials: Any) -> Serving:
    """Serve each of `services` with what adds it to a server. Raises FederationError if it cannot listen."""
    server = grpc.server(ThreadPoolExecutor(max_workers=WORKERS), options=OPTIONS)
    for service, add in services:
        add(service, server)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise FederationError(
            f"cannot listen on {address}: in use, or not an address of this machine",
            next_step="stop what uses it, or choose another port",
        )
    server.start()
    return Serving(server, port, services[0][0])


@contextlib.contextmanager
def no_text(context: Any) -> Iterator[None]:
    """gRPC would send the text of an exception to the caller; this logs it here instead."""
    try:
        yield
    except Exception:
        if context.code() is None and context.is_active():
            log.exception("a call failed")
            context.abort(grpc.StatusCode.INTERNAL, "internal error")
        raise
