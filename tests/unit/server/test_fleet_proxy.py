"""The Fleet proxy in front of a SuperLink that remembers what reached it."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import flwr.superlink.routers.fleet.router as flower_router
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common import fleet
from common.fleet import FLEET_CALLS, build


class SuperLink:
    """Answers every call and keeps it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, str], bytes]] = []
        methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
        self.app = Starlette(routes=[Route("/{path:path}", self.take, methods=methods)])

    async def take(self, request: Request) -> Response:
        body = await request.body()
        self.calls.append((request.method, request.url.path, dict(request.headers), body))
        return Response(
            b"\x00answer\xff", 418, {"x-flower": "yes", "connection": "close", "keep-alive": "timeout=5"}
        )


def through(calls: Callable[[httpx.AsyncClient], Awaitable[Any]], transport: httpx.AsyncBaseTransport) -> Any:
    """Run `calls` with a client of the proxy."""

    async def go() -> Any:
        app = build("https://superlink.test:1", Path("unused"), transport)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://proxy.test") as client,
        ):
            return await calls(client)

    return asyncio.run(go())


def ask(superlink: SuperLink, method: str, path: str, **options: Any) -> httpx.Response:
    answer = through(
        lambda client: client.request(method, path, **options), httpx.ASGITransport(superlink.app)
    )
    assert isinstance(answer, httpx.Response)
    return answer


def test_the_twelve_fleet_calls_go_through_byte_for_byte() -> None:
    superlink = SuperLink()
    assert len(FLEET_CALLS) == 12
    for call in sorted(FLEET_CALLS):
        answer = ask(superlink, "POST", f"/v1/fleet/{call}", content=b"\x08\x01\xff" + call.encode())
        assert (answer.status_code, answer.content, answer.headers["x-flower"]) == (
            418,
            b"\x00answer\xff",
            "yes",
        )
        method, path, _, body = superlink.calls[-1]
        assert (method, path, body) == ("POST", f"/v1/fleet/{call}", b"\x08\x01\xff" + call.encode())


def test_the_calls_are_those_of_the_installed_flower() -> None:
    source = Path(flower_router.__file__).read_text()
    found = set(re.findall(r'"/v1/fleet/([a-z-]+)"', source)) or set(
        re.findall(r'post\(\s*"/([a-z-]+)"', source)
    )
    assert found == FLEET_CALLS


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/list-runs"),
        ("POST", "/v1/runtime/acquire-task"),
        ("GET", "/v1/fleet/get-run"),
        ("HEAD", "/v1/fleet/get-run"),
        ("PUT", "/v1/fleet/push-messages"),
        ("POST", "/v1/fleet/unknown-call"),
        ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/get-run/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/..%2Fcontrol%2Fstart-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "//v1/fleet/get-run"),
        ("POST", "/V1/FLEET/GET-RUN"),
        ("GET", "/"),
        ("OPTIONS", "/"),
        ("GET", "/docs"),
    ],
)
def test_everything_else_is_forbidden(method: str, path: str) -> None:
    superlink = SuperLink()
    assert ask(superlink, method, path).status_code == 403
    assert superlink.calls == []


def test_a_query_is_not_passed_on() -> None:
    superlink = SuperLink()
    ask(superlink, "POST", "/v1/fleet/get-run?next=/v1/control/start-run")
    assert superlink.calls[0][1] == "/v1/fleet/get-run"


def test_a_big_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "MAX_BODY_BYTES", 1000)
    superlink = SuperLink()
    assert ask(superlink, "POST", "/v1/fleet/push-object", content=b"x" * 1001).status_code == 413
    assert superlink.calls == []
    assert ask(superlink, "POST", "/v1/fleet/push-object", content=b"x" * 1000).status_code == 418
    assert len(superlink.calls[0][3]) == 1000


def test_hop_by_hop_headers_end_here() -> None:
    superlink = SuperLink()
    sent = {
        "connection": "keep-alive", "keep-alive": "5", "te": "trailers", "upgrade": "h2c",
        "x-flwr-signature": "abc", "content-type": "application/protobuf",
    }  # fmt: skip
    answer = ask(superlink, "POST", "/v1/fleet/get-fab", headers=sent, content=b"12345")
    _, _, headers, _ = superlink.calls[0]
    assert headers["x-flwr-signature"] == "abc"
    assert headers["content-type"] == "application/protobuf"
    assert headers["host"] == "superlink.test:1"
    assert headers["content-length"] == "5"
    assert not {"te", "upgrade"} & set(headers)
    assert headers.get("keep-alive") is None
    assert not {"connection", "keep-alive"} & set(answer.headers)


def test_a_superlink_that_is_away_is_503() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    answer = through(lambda client: client.post("/v1/fleet/get-run"), httpx.MockTransport(refuse))
    assert (answer.status_code, answer.content) == (503, b"")
