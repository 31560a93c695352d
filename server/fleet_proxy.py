"""The only way from outside to the SuperLink: Fleet paths, and nothing else.

The SuperLink listens on loopback and serves Fleet, Control and Runtime on one port; whoever holds the
CA certificate could start runs there. This process listens on the public address, forwards the twelve
Fleet calls byte for byte (TLS on both legs), and answers 403 to everything else.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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


def build(
    superlink: str, ca_certificate: Path, transport: httpx.AsyncBaseTransport | None = None
) -> Starlette:
    """The proxy for the SuperLink at `superlink` (https://host:port); `transport` is for tests."""
    context = ssl.create_default_context(cafile=str(ca_certificate)) if transport is None else True

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            base_url=superlink, verify=context, timeout=60.0, transport=transport, trust_env=False
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
        try:
            answer = await request.app.state.client.post(
                f"/v1/fleet/{call}",
                content=bytes(body),
                headers=[(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP],
            )
        except httpx.HTTPError:
            return Response(status_code=503)
        headers = {
            k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP | {"content-encoding"}
        }
        return Response(answer.content, status_code=answer.status_code, headers=headers)

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


def serve(host: str, port: int, superlink: str, ca: Path, certificate: Path, key: Path) -> None:
    """Serve the proxy until the process is told to end."""
    uvicorn.run(
        build(superlink, ca),
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        access_log=False,
    )
