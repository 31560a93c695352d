"""`isthmus` with an owner's runner that leaks: the positive control of the canary test.

    python leaky.py client up --home HOME

What it leaks is in `HOME/leaks.json`, encoded already (hexadecimal): `fields` ride behind the envelope of
each upload, as a field that no schema has; `metadata` in the header of each call; `posts` go to the control
channel's port; `tensor` is written over a part of the fine-tuned vector before the gate sees it, as a
leaking trainer would. Nothing of it is the product's; all of the rest is.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from clients import actions, exchange_client, runner, up
from clients.home import ClientHome
from common.cli import main
from common.wire import exchange_pb2 as pb

FIELD = 99


class Leak(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Adds to each upload what its schema does not have."""

    def __init__(self, leaks: dict[str, Any]) -> None:
        self._metadata = [
            (name, bytes.fromhex(value) if name.endswith("-bin") else bytes.fromhex(value).decode())
            for name, value in leaks["metadata"].items()
        ]
        self._extra = b"".join(field(FIELD, bytes.fromhex(value)) for value in leaks["fields"])

    def intercept_stream_stream(self, call: Any, details: Any, requests: Iterator[Any]) -> Any:
        return call(details._replace(metadata=self._metadata), self._with_leak(requests))

    def _with_leak(self, requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            extra = self._extra if request.WhichOneof("part") == "envelope" else b""
            yield pb.UploadRequest.FromString(request.SerializeToString() + extra)


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, fewer than 2 MiB."""
    tag, size = number << 3 | 2, len(content)
    low = [tag & 127 | 128, tag >> 7, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]
    return bytes(low) + content


def overwrite(vector: Path, content: bytes) -> None:
    """Write `content` into the middle of the largest tensor of a safetensors file."""
    with vector.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
        spans = [entry["data_offsets"] for name, entry in table.items() if name != "__metadata__"]
        first, last = max(spans, key=lambda span: span[1] - span[0])
        file.seek(8 + size + (first + last) // 8 * 4)
        file.write(content)


def leak(home: ClientHome) -> None:
    """Put the leaks where this process sends from."""
    leaks = json.loads((home.path / "leaks.json").read_text())
    connect, run_job = exchange_client.connect, actions.run_job
    exchange_client.connect = lambda *arguments: grpc.intercept_channel(connect(*arguments), Leak(leaks))

    def leaking_job(job: Any) -> Any:
        result = run_job(job)
        if job.mode == "fit":
            overwrite(Path(result["vector_path"]), bytes.fromhex(leaks["tensor"]))
        return result

    actions.run_job = leaking_job
    host, port = home.config.server.fleet.rsplit(":", 1)
    for content in map(bytes.fromhex, leaks["posts"]):
        trusted = ssl.create_default_context(cafile=str(home.keys / "ca.crt"))
        link = http.client.HTTPSConnection(host, int(port), context=trusted, timeout=30)
        pieces = [content[at : at + 5] for at in range(0, len(content), 5)]
        link.request("POST", "/v1/fleet/get-fab", iter(pieces), {"x": "y"}, encode_chunked=True)
        link.getresponse().read()
        link.close()


if __name__ == "__main__":
    if sys.argv[1] == "runner":
        leak(ClientHome(Path(sys.argv[2])))
        runner.main(sys.argv[2])
    else:
        original = up.python_module
        up.python_module = lambda module, *rest: (
            [sys.executable, "-P", __file__, "runner", *rest]
            if module == "clients.runner"
            else original(module, *rest)
        )
        main()
