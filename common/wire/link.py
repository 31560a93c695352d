"""The gRPC link to the server: connecting, retrying, and what its errors mean to us.

Connections go straight to the server: proxies named in the environment are not used. A call whose link
breaks is repeated with longer and longer pauses; a call that the server will never take is not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc

from common.errors import RefusedError, TransportError
from common.tls import TlsFiles

CALL_S = 30.0
BACKOFF_S = (0.2, 10.0)
PERMANENT = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
T = TypeVar("T")


def connect(address: str, ca: Path, own: TlsFiles | None = None) -> Any:
    """A TLS channel to `address` (host:port) that trusts `ca` alone; with `own`, mutual TLS."""
    return connect_to(address, ca.read_bytes(), own)


def connect_to(address: str, ca: bytes, own: TlsFiles | None = None) -> Any:
    """As `connect`, with the CA certificate as PEM."""
    key, certificate = (own.key.read_bytes(), own.certificate.read_bytes()) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(address, credentials, options=OPTIONS)


def retried(call: Callable[[], T], *, for_s: float, sleep: Callable[[float], None] = time.sleep) -> T:
    """Repeat `call` while the link is at fault, waiting longer each time, for `for_s` seconds in all.

    Raises TransportError when the time is over, and at once whatever else `call` raises.
    """
    until, pause_s = time.monotonic() + for_s, BACKOFF_S[0]
    while True:
        try:
            return call()
        except grpc.RpcError as err:
            problem = translated(err)
        except TransportError as err:
            problem = err
        if not isinstance(problem, TransportError) or time.monotonic() + pause_s > until:
            raise problem
        sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, no secret
        pause_s = min(2 * pause_s, BACKOFF_S[1])


def translated(err: grpc.RpcError) -> RefusedError | TransportError:
    """What a gRPC error means: never again, or later."""
    code = err.code()
    if code in PERMANENT:
        reason = code.name.lower().replace("_", "-")
        return RefusedError(f"the server refused the call: {reason}", reason=reason)
    return TransportError(
        f"the link to the server broke: {code.name.lower()}", next_step="try again; what is across is kept"
    )


def raise_refused(refused: Any) -> NoReturn:
    """Raise the server's refusal, its text cut to what is printable."""
    reason = refused.reason[:40]
    text = "".join(letter for letter in refused.text[:300] if letter.isprintable())
    raise RefusedError(f"the server refused it ({reason}): {text}", reason=reason)
