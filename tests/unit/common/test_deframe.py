"""De-framing: what HTTP/2, HPACK, gRPC and HTTP/1.1 tear apart or hide is whole and in the clear again."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable

import h11
import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from common.audit.deframe import PREFACE, Part, deframe, protobuf_fields
from common.audit.scan import Scan, Scanner
from common.wire import exchange_pb2 as pb

USER = "quokka-7f3a91"
GRPC = [(":path", "/isthmus.exchange.v1.Exchange/Upload"), ("content-type", "application/grpc")]


def frame(kind: int, body: bytes, *, stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def message(content: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(content)) + content


def parts(stream: bytes) -> dict[tuple[int, str], bytes]:
    found = {(part.stream, part.name): part.data for part in deframe(stream)}
    assert all(part.framed for part in deframe(stream)), found
    return found


def cut(data: bytes, size: int, *, stream: int = 1) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(frame(0, piece, stream=stream) for piece in pieces)


def test_a_payload_in_chunks_in_frames_is_one_piece() -> None:
    payload = bytes(range(256)) * 40
    sent = b"".join(
        message(pb.UploadRequest(chunk=payload[at : at + 999]).SerializeToString())
        for at in range(0, len(payload), 999)
    )
    sent = message(pb.UploadRequest(envelope=b"{header}").SerializeToString()) + sent
    encoder = Encoder()
    stream = PREFACE + frame(4, b"") + frame(1, encoder.encode(GRPC), stream=1, flags=4) + cut(sent, 700)
    found = parts(stream)
    assert found[1, "field 1"] == b"{header}"
    assert found[1, "field 2"] == payload
    assert b"content-type: application/grpc" in found[1, "header"]


def test_headers_over_continuation_and_with_priority_and_padding() -> None:
    block = Encoder().encode([*GRPC, ("x-user", USER)], huffman=True)
    padded = bytes([6]) + b"\0\0\0\0\x10" + block[:20] + b"hidden"
    stream = PREFACE + frame(1, padded, stream=1, flags=0x8 | 0x20)
    stream += frame(9, block[20:30], stream=1) + frame(9, block[30:], stream=1, flags=4)
    assert USER.encode() not in stream
    found = parts(stream)
    assert f"x-user: {USER}".encode() in found[1, "header"]
    assert b"hidden" in found[0, "other frames"]


def test_a_server_s_side_and_its_trailers_are_read() -> None:
    encoder = Encoder()
    head = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    end = encoder.encode([("grpc-status", "13"), ("grpc-message", f"no such user {USER}")])
    body = message(pb.UploadReply(resume=pb.Resume(offset=7)).SerializeToString())
    stream = frame(4, bytes(6)) + frame(1, head, stream=1, flags=4) + cut(body, 3)
    found = parts(stream + frame(1, end, stream=1, flags=5))
    assert found[1, "field 2"] == b"\x08\x07"
    assert USER.encode() in found[1, "header"]


def test_repeated_numbers_stand_together_without_their_tags() -> None:
    ids = [212, 17, 230, 44, 101, 9, 151, 66, 203, 88]
    unpacked = b"".join(b"\x18" + (bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])) for n in ids)
    stream = PREFACE + frame(1, Encoder().encode(GRPC), stream=1, flags=4) + cut(message(unpacked), 9)
    assert parts(stream)[1, "numbers 3"] == unpacked.replace(b"\x18", b"")
    found = Scan()
    Scanner([ids]).add(found, "up", stream)
    assert [hit.form for hit in found.hits] == ["varint"]


def test_compressed_messages_are_opened() -> None:
    content = pb.UploadRequest(chunk=b"tensor bytes").SerializeToString()
    lines = [*GRPC, ("grpc-encoding", "gzip")]
    stream = PREFACE + frame(1, Encoder().encode(lines), stream=1, flags=4)
    assert parts(stream + cut(message(gzip.compress(content), 1), 10))[1, "field 2"] == b"tensor bytes"


@pytest.mark.parametrize(
    "hide",
    [
        lambda user: frame(6, user[:8]) + frame(6, user[8:].ljust(8)),
        lambda user: frame(7, bytes(8) + user),
        lambda user: frame(0, bytes([len(user)]) + b"data" + user, stream=1, flags=8),
        lambda user: frame(0xEE, user, stream=3),
        lambda user: frame(1, Encoder().encode([("x", user)], huffman=True), stream=5, flags=4),
        lambda user: cut(user, 5),
        lambda user: frame(0, bytes([99]) + user, stream=1, flags=8),
        lambda user: frame(1, b"\xff" + user, stream=1, flags=0),
        lambda user: frame(2, b"1234") + user,
    ],
    ids=[
        *("ping", "goaway", "padding", "unknown frame", "header", "torn body"),
        *("wrong padding", "unfinished header", "no frame"),
    ],
)
def test_wherever_a_canary_hides_it_is_found(hide: Callable[[bytes], bytes]) -> None:
    stream = PREFACE + frame(4, b"") + hide(USER.encode())
    found = Scan()
    Scanner([USER]).add(found, "up", stream)
    assert found.found == {0}


def test_http_1_requests_with_lengths_and_chunks() -> None:
    user = h11.Connection(h11.CLIENT)
    stream = b""
    for framing in (("Content-Length", "26"), ("Transfer-Encoding", "chunked")):
        stream += user.send(
            h11.Request(method="POST", target="/v1/fleet/x", headers=[("Host", "a"), framing])
        )
        stream += user.send(h11.Data(b"half of it, "))
        stream += user.send(h11.Data(b"the other half"))
        stream += user.send(h11.EndOfMessage())
        user = h11.Connection(h11.CLIENT)
    found = parts(stream)
    assert found[1, "body"] == found[2, "body"] == b"half of it, the other half"
    assert found[2, "chunk lines"].split() == [b"c", b"e", b"0"]


def test_http_1_answers_with_and_without_a_body() -> None:
    stream = b"HTTP/1.1 204 No Content\r\n\r\n" + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody"
    stream += b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx-last: z\r\n\r\n"
    stream += b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nto the end"
    found = parts(stream)
    assert {key: value for key, value in found.items() if key[1] == "body"} == {
        (2, "body"): b"body",
        (3, "body"): b"abc",
        (4, "body"): b"to the end",
    }
    assert b"x-last: z" in found[3, "chunk lines"] and b"x=y" in found[3, "chunk lines"]


def test_what_is_cut_short_or_is_no_http_is_said_to_be_so() -> None:
    whole = PREFACE + frame(1, Encoder().encode(GRPC), stream=1, flags=4) + cut(message(b"\x0a\x03abc"), 99)
    assert all(part.framed for part in deframe(whole))
    for stream in (whole[:-1], b"SSH-2.0-x\r\n", whole + b"\0\0\x09", b"POST /a HTTP/1.1\r\nhost"):
        unframed = [part for part in deframe(stream) if not part.framed]
        assert len(unframed) == 1 and stream.endswith(unframed[0].data)
    assert deframe(b"") == []


@given(st.binary(max_size=200), st.sampled_from([b"", PREFACE, frame(4, b""), b"POST / HTTP/1.1\r\n\r\n"]))
def test_any_bytes_become_parts(data: bytes, start: bytes) -> None:
    assert all(isinstance(part, Part) for part in deframe(start + data))


@given(st.binary(max_size=100))
def test_any_bytes_are_fields_or_no_message(data: bytes) -> None:
    try:
        fields = protobuf_fields(data)
    except ValueError:
        return
    assert sum(len(value) for _, value in fields) < max(1, len(data))
