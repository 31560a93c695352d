"""Make the stubs in this folder again from `proto/`: `python -m common.wire.generate`.

Needs grpcio-tools, which only a developer has. protoc derives the import path from the folder of the
.proto file; ours live in `common.wire`, so that one import is rewritten.
"""

from __future__ import annotations

import importlib.resources
import tempfile
from pathlib import Path

PROTO_NAME = "isthmus/exchange/v1/exchange.proto"
WIRE = Path(__file__).resolve().parent
PROTO = WIRE.parent.parent / "proto"


def protoc(*arguments: str) -> None:
    """Run the protoc of grpcio-tools on our one file. Raises RuntimeError when it fails."""
    from grpc_tools import protoc as compiler

    include = str(importlib.resources.files("grpc_tools") / "_proto")
    code = compiler.main(["protoc", f"-I{PROTO}", f"-I{include}", *arguments, PROTO_NAME])
    if code:
        raise RuntimeError(f"protoc ended with code {code}")


def generate(target: Path = WIRE) -> None:
    """Write `exchange_pb2.py` and `exchange_pb2_grpc.py` into `target`."""
    with tempfile.TemporaryDirectory() as folder:
        protoc(f"--python_out={folder}", f"--grpc_python_out={folder}")
        for made in sorted(Path(folder).rglob("exchange_pb2*")):
            text = made.read_text(encoding="utf-8")
            text = text.replace("from isthmus.exchange.v1 import", "from common.wire import")
            (target / made.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    generate()
