"""From the bytes of a connection to what was said on it: HTTP/2 with HPACK, gRPC, protobuf, HTTP/1.1.

`deframe` takes one direction of one connection as it was before TLS, and returns all of it in parts in
which nothing is torn apart: header lines in the clear, the body of each exchange without its frames, and
of gRPC the content of each protobuf field, joined over the messages of a call, so that a payload sent in
chunks is one piece again. Padding, pings and every other frame are parts too. What it cannot read it
returns as it is, with `framed` false.

    for part in deframe(Path("up").read_bytes()): print(part.stream, part.name, len(part.data))
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from hpack import Decoder
from hpack.exceptions import HPACKError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PUSH_PROMISE, CONTINUATION = 0, 1, 4, 5, 9
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
HTTP_1 = re.compile(rb"(?:[A-Z]{1,20} \S+ HTTP/1\.[01]|HTTP/1\.[01] [1-5][0-9]{2}[^\r\n]*)\r\n")
BODILESS = re.compile(rb"HTTP/1\.[01] (?:1[0-9]{2}|204|304)")
MAX_HEADERS_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """Bytes that belong together: `name` of exchange `stream` (0: of the connection itself)."""

    stream: int
    name: str
    data: bytes
    framed: bool = True


def deframe(stream: bytes) -> list[Part]:
    """All parts of one direction of a connection. Never raises: what is malformed is a part, unframed."""
    if stream.startswith(PREFACE):
        return list(_http_2(stream, len(PREFACE)))
    if len(stream) >= 9 and stream[3:9] == bytes((SETTINGS, 0, 0, 0, 0, 0)):  # how a server begins
        return list(_http_2(stream, 0))
    if HTTP_1.match(stream):
        return list(_http_1(stream))
    return [Part(0, "bytes", stream, framed=False)] if stream else []


# HTTP/2 (RFC 9113)


def _http_2(stream: bytes, start: int) -> Iterator[Part]:
    decoder = Decoder(max_header_list_size=MAX_HEADERS_BYTES)
    decoder.max_allowed_table_size = 1 << 20
    lines: dict[int, list[bytes]] = defaultdict(list)
    bodies: dict[int, bytearray] = defaultdict(bytearray)
    rest, block = bytearray(), bytearray()
    try:
        while start < len(stream):
            kind, flags, number, frame = _frame(stream, start)
            body, extra = _unpadded(frame, flags) if kind in (DATA, HEADERS, PUSH_PROMISE) else (frame, b"")
            rest += extra
            if kind == DATA:
                bodies[number] += body
            elif kind in (HEADERS, PUSH_PROMISE, CONTINUATION):
                skipped = (5 if flags & PRIORITY else 0) if kind == HEADERS else 4 * (kind == PUSH_PROMISE)
                rest += body[:skipped]
                block += body[skipped:]
                if flags & END_HEADERS:
                    lines[number] += [name + b": " + value for name, value in _headers(decoder, block)]
                    block.clear()
            else:
                rest += body
            start += 9 + len(frame)
    except (ValueError, HPACKError):
        yield Part(0, "bytes", stream[start:], framed=False)
    if block:
        yield Part(0, "unfinished header", bytes(block), framed=False)
    for number in sorted({*lines, *bodies}):
        yield Part(number, "header", b"\n".join(lines[number]))
        yield from _body(number, bytes(bodies[number]), lines[number])
    if rest:
        yield Part(0, "other frames", bytes(rest))


def _frame(stream: bytes, start: int) -> tuple[int, int, int, bytes]:
    head = stream[start : start + 9]
    size = int.from_bytes(head[:3])
    body = stream[start + 9 : start + 9 + size]
    if len(head) < 9 or len(body) < size:
        raise ValueError("the last frame is cut short")
    return head[3], head[4], int.from_bytes(head[5:9]) & 0x7FFFFFFF, body


def _unpadded(frame: bytes, flags: int) -> tuple[bytes, bytes]:
    """A frame's content and its padding."""
    if not flags & PADDED:
        return frame, b""
    if not frame or frame[0] >= len(frame):
        raise ValueError("more padding than frame")
    end = len(frame) - frame[0]
    return frame[1:end], frame[end:]


def _headers(decoder: Decoder, block: bytearray) -> Iterator[tuple[bytes, bytes]]:
    for name, value in decoder.decode(bytes(block), raw=True):
        yield bytes(name), bytes(value)


def _body(number: int, body: bytes, lines: list[bytes]) -> Iterator[Part]:
    if not body:
        return
    if not any(line.startswith(b"content-type: application/grpc") for line in lines):
        yield Part(number, "body", body)
        return
    encodings = [line.partition(b": ")[2] for line in lines if line.startswith(b"grpc-encoding: ")]
    yield from _grpc(number, body, encodings[-1] if encodings else b"identity")


# gRPC and protobuf


def _grpc(number: int, body: bytes, encoding: bytes) -> Iterator[Part]:
    fields: dict[str, bytearray] = defaultdict(bytearray)
    start = 0
    while start + 5 <= len(body):
        end = start + 5 + int.from_bytes(body[start + 1 : start + 5])
        if body[start] > 1 or end > len(body):
            break
        message = body[start + 5 : end]
        if body[start]:
            message = _decompressed(message, encoding)
        start = end
        try:
            for name, value in protobuf_fields(message):
                fields[name] += value
        except ValueError:
            fields["message"] += message
    for name in sorted(fields):
        yield Part(number, name, bytes(fields[name]))
    if start < len(body):
        yield Part(number, "bytes", body[start:], framed=False)


def _decompressed(message: bytes, encoding: bytes) -> bytes:
    try:
        if encoding == b"gzip":
            return gzip.decompress(message)
        return zlib.decompress(message) if encoding == b"deflate" else message
    except (OSError, EOFError, zlib.error):
        return message


def protobuf_fields(message: bytes) -> list[tuple[str, bytes]]:
    """(`field N` or `numbers N`, content) of each field at the top level of `message`, tags left out.

    Numbers are the bytes that they have on the wire. Raises ValueError when it is no protobuf message.
    """
    found, start = [], 0
    while start < len(message):
        tag, start = _varint(message, start)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, start = _varint(message, start)
            end = start + size
        elif wire == 0:
            _, end = _varint(message, start)
        elif wire in (1, 5):
            end = start + (8 if wire == 1 else 4)
        else:
            raise ValueError("no such wire type")
        if not number or end > len(message):
            raise ValueError("not a field")
        found.append((f"{'field' if wire == 2 else 'numbers'} {number}", message[start:end]))
        start = end
    return found


def _varint(message: bytes, start: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[start : start + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, start + index + 1
    raise ValueError("not a varint")


# HTTP/1.1 (RFC 9112)


def _http_1(stream: bytes) -> Iterator[Part]:
    start = number = 0
    while start < len(stream):
        number += 1
        end = stream.find(b"\r\n\r\n", start)
        if end < 0 or not HTTP_1.match(stream, start):
            yield Part(number, "bytes", stream[start:], framed=False)
            return
        head = stream[start:end]
        yield Part(number, "header", head)
        body, extra, start = _http_1_body(stream, end + 4, head)
        if body:
            yield Part(number, "body", body)
        if extra:
            yield Part(number, "chunk lines", extra)


def _http_1_body(stream: bytes, start: int, head: bytes) -> tuple[bytes, bytes, int]:
    """The body, what stood between its chunks, and where the next message begins."""
    fields = dict(re.findall(rb"(?m)^([^:\r\n]+):[ \t]*([^\r\n]*)", head.lower()))
    if fields.get(b"transfer-encoding", b"").endswith(b"chunked"):
        return _chunked(stream, start)
    length = fields.get(b"content-length", b"")
    if length.isdigit():
        end = start + int(length)
    elif head.startswith(b"HTTP/") and not BODILESS.match(head):
        end = len(stream)  # until the connection closes
    else:
        end = start
    return stream[start:end], b"", end


def _chunked(stream: bytes, start: int) -> tuple[bytes, bytes, int]:
    body, between = bytearray(), bytearray()
    while True:
        end = stream.find(b"\r\n", start)
        size = re.match(rb"[0-9A-Fa-f]{1,8}", stream[start : max(end, start)])
        if size is None:
            return bytes(body), bytes(between), start  # what follows is no HTTP: the caller says so
        between += stream[start:end] + b"\n"
        start = end + 2
        if not int(size[0], 16):
            end = stream.find(b"\r\n\r\n", end)
            stop = len(stream) if end < 0 else end + 4
            return bytes(body), bytes(between + stream[start:stop]), stop
        body += stream[start : start + int(size[0], 16)]
        start += int(size[0], 16) + 2
