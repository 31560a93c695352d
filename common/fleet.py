"""Flower's Fleet calls, and a proxy that lets them through and nothing else: on either shore.

The merge server puts one in front of its SuperLink, an owner puts one in front of the outside. It answers 403
to every other path, and hands each request to a `Screen`, which may change or refuse it. TLS on both legs.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.errors import GateError, StorageError

FLEET_CALLS = frozenset(
    {
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    }
)
MAX_BODY_BYTES = 16 << 20
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "host", "content-length"}
)


class Screen(Protocol):
    """Looks at what passes; what it returns goes on. GateError refuses (403), StorageError delays (503)."""

    def request(self, call: str, body: bytes) -> bytes: ...

    def passes_header(self, name: str) -> bool: ...

    def answer(self, call: str, content: bytes) -> bytes: ...


class Everything:
    """A screen that lets every Fleet call through byte for byte."""

    def request(self, call: str, body: bytes) -> bytes:
        return body

    def passes_header(self, name: str) -> bool:
        return True

    def answer(self, call: str, content: bytes) -> bytes:
        return content


def build(
    upstream: str,
    ca_certificate: Path,
    transport: httpx.AsyncBaseTransport | None = None,
    screen: Screen = Everything(),  # noqa: B008 - holds nothing
) -> Starlette:
    """The proxy for whoever serves Fleet at `upstream` (https://host:port); `transport` is for tests."""
    context = ssl.create_default_context(cafile=str(ca_certificate)) if transport is None else True

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            base_url=upstream, verify=context, timeout=60.0, transport=transport, trust_env=False
        ) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in FLEET_CALLS:
            return Response(status_code=403)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return Response(status_code=413)
        names = HOP_BY_HOP.__contains__
        try:
            answer = await request.app.state.client.post(
                f"/v1/fleet/{call}",
                content=screen.request(call, bytes(body)),
                headers=[
                    (k, v)
                    for k, v in request.headers.items()
                    if not names(k.lower()) and screen.passes_header(k.lower())
                ],
            )
        except GateError:
            return Response(status_code=403)
        except (httpx.HTTPError, StorageError):
            return Response(status_code=503)
        headers = {
            k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP | {"content-encoding"}
        }
        content = screen.answer(call, answer.content) if answer.status_code == 200 else answer.content
        return Response(content, status_code=answer.status_code, headers=headers)

    async def refuse(_request: Request) -> Response:
        return Response(status_code=403)

    return Starlette(
        routes=[
            Route("/v1/fleet/{call}", forward, methods=["POST"]),
            Route(
                "/{path:path}", refuse, methods=["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
            ),
        ],
        lifespan=lifespan,
    )


def serve(app: Starlette, host: str, port: int, certificate: Path, key: Path) -> None:
    """Serve a proxy until the process is told to end."""
    import uvicorn

    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        access_log=False,
    )
