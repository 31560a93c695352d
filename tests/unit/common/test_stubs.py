"""The checked-in stubs are those of the .proto file."""

from pathlib import Path

import pytest

from common.wire import exchange_pb2
from common.wire.generate import PROTO, protoc


def test_stubs_match_the_definition(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    if not PROTO.is_dir():
        pytest.skip("proto/ is not beside this installation")
    from google.protobuf import descriptor_pb2

    protoc(f"--descriptor_set_out={tmp_path / 'set'}")
    made = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    known = descriptor_pb2.FileDescriptorProto()
    exchange_pb2.DESCRIPTOR.CopyToProto(known)
    for message in (*made.message_type, *known.message_type):
        for field in message.field:
            field.ClearField("json_name")
    assert made == known


def test_proto_is_not_importable() -> None:
    assert not list(PROTO.rglob("__init__.py"))
