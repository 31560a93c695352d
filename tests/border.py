"""The border between an owner and the server: all that crosses, in the clear and as it is on the wire.

A `Tap` stands before one port of the server. It ends TLS on both sides with their own certificates and
keys, which a test has, and keeps what goes through: one file for each direction of each connection. A
`LinkWatch` reads every packet on the cable between the two, so that what goes by no tap is seen, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namespaces import inside, tcp_socket

from common.audit.deframe import deframe
from common.tls import TlsFiles

READ_BYTES = 256 << 10
SHUTDOWN_S = 1.0
HELLO_BYTES = 4096  # of each direction of a flow: where TLS is not yet secret
ETH_P_ALL, IPV4, ARP, TCP = 3, 0x0800, 0x0806, 6
CARRIES = {  # the fields of each call that the ledgers have as bytes: (towards the server, back)
    "Upload": (("field 1", "field 2"), ("field 3", "field 4")),
    "Download": ((), ("field 1", "field 2")),
    "Acknowledge": (("field 1",), ()),
    "GetCheckpoint": ((), ("field 1", "field 2")),
    "AddCheckpoint": (("field 2", "field 3", "field 4"), ("field 2",)),
    "Rotate": (("field 1",), ()),
    "Status": ((), ()),
}
SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 263, 6, 33


class Tap:
    """Relays `address`:(a free port) in namespace `space` to `address`:`target`; `alpn` on both legs.

    With `owner` it asks for the owner's certificate, and shows it to the server as the owner does.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        space: str,
        address: str,
        target: int,
        server: TlsFiles,
        alpn: str,
        owner: TlsFiles | None = None,
    ) -> None:
        self.folder, self.name = folder, name
        self._space, self._address, self._target = space, address, target
        self._server, self._owner, self._alpn = server, owner, alpn
        self._listener = tcp_socket(space)
        self._listener.bind((address, 0))
        self._listener.listen(64)
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self.errors: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()

    def close(self) -> None:
        """Stop, once everything that was read is written. May be called twice."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._loop.close()

    async def _serve(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._server.certificate, self._server.key)
        context.set_alpn_protocols([self._alpn])
        if self._owner is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._server.ca)
        async with await asyncio.start_server(
            self._relay, sock=self._listener, ssl=context, ssl_shutdown_timeout=SHUTDOWN_S
        ):
            await self._stop.wait()
        open_ = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_:
            task.cancel()
        await asyncio.gather(*open_, return_exceptions=True)
        await asyncio.sleep(0.1)  # for what was aborted to be closed

    async def _relay(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.connections += 1
        path = self.folder / f"{self.name}-{self.connections:03d}"
        outs = [near_out]
        try:
            far_in, far_out = await self._upstream()
            outs.append(far_out)
            await asyncio.gather(
                self._pump(near_in, far_out, path.with_suffix(".up")),
                self._pump(far_in, near_out, path.with_suffix(".down")),
            )
        except OSError as err:
            self.errors.append(f"{path.name}: {err}")
        finally:
            for out in outs:
                out.transport.abort()  # both sides have ended: whoever ended had all that it wanted

    async def _upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context(cafile=str(self._server.ca))
        context.set_alpn_protocols([self._alpn])
        if self._owner is not None:
            context.load_cert_chain(self._owner.certificate, self._owner.key)
        upstream = tcp_socket(self._space)
        try:
            upstream.setblocking(False)
            await self._loop.sock_connect(upstream, (self._address, self._target))
            return await asyncio.open_connection(
                sock=upstream,
                ssl=context,
                server_hostname=self._address,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except BaseException:
            upstream.close()
            raise

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, path: Path) -> None:
        path.touch()
        with contextlib.suppress(OSError, ssl.SSLError):
            while chunk := await source.read(READ_BYTES):
                with path.open("ab") as kept:
                    kept.write(chunk)
                sink.write(chunk)
                await sink.drain()
        sink.close()


@dataclass
class _Flow:
    """One direction of one TCP connection on the link."""

    start: int = -1
    end: int = 0
    hello: bytearray = field(default_factory=bytearray)


class LinkWatch:
    """Reads every frame on `link` in namespace `space` until it is closed.

    `tcp_bytes[port]` is (to the port, from the port) of `address`: what TCP carried, TLS and all, without
    what was sent twice. `others` counts the frames that are no TCP with `address`; `kept` holds these whole
    and the first bytes of each flow, which no TLS hides.
    """

    def __init__(self, space: str, link: str, address: str) -> None:
        self._address = socket.inet_aton(address)
        self._flows: dict[tuple[bytes, int, bytes, int], _Flow] = {}
        self.others: Counter[str] = Counter()
        self.kept = bytearray()
        self._socket = inside(space, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 512 << 20)
        self._socket.bind((link, ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def close(self) -> int:
        """Stop; how many frames the kernel could not give us."""
        self._closing.set()
        self._thread.join()
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        self._socket.close()
        self.kept += b"".join(flow.hello for flow in self._flows.values())
        return int(struct.unpack("II", statistics)[1])

    @property
    def tcp_bytes(self) -> dict[int, tuple[int, int]]:
        """Port of the server -> bytes towards it and from it, over all connections."""
        found: dict[int, list[int]] = {}
        for (source, source_port, _, port), flow in self._flows.items():
            back = source == self._address
            found.setdefault(source_port if back else port, [0, 0])[back] += flow.end
        return {port: (up, down) for port, (up, down) in found.items()}

    def _read(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                while True:
                    self._take(self._socket.recv(1 << 17))

    def _take(self, frame: bytes) -> None:
        (kind,) = struct.unpack_from(">H", frame, 12)
        head = 14 + 4 * (frame[14] & 15)
        if kind != IPV4 or frame[23] != TCP or self._address not in (frame[26:30], frame[30:34]):
            self.others["arp" if kind == ARP else f"{kind:#06x}/{frame[23]}"] += 1
            self.kept += frame
            return
        source_port, port, sequence = struct.unpack_from(">HHI", frame, head)
        content = frame[head + 4 * (frame[head + 12] >> 4) : 14 + struct.unpack_from(">H", frame, 16)[0]]
        flow = self._flows.setdefault((frame[26:30], source_port, frame[30:34], port), _Flow())
        if frame[head + 13] & 2:  # SYN: its number is before the first byte's
            flow.start = (sequence + 1) % 2**32
            return
        offset = (sequence - flow.start) % 2**32
        if content and offset < 2**31:
            flow.end = max(flow.end, offset + len(content))
            if offset == len(flow.hello) < HELLO_BYTES:
                flow.hello += content[:HELLO_BYTES]


@dataclass
class Heard:
    """What a tap heard on the data channel of what ledgers record; `strange`: in fields of no schema."""

    bytes: list[int] = field(default_factory=lambda: [0, 0])  # up, down
    calls: Counter[str] = field(default_factory=Counter)
    strange: int = 0


def heard(capture: Path, name: str) -> Heard:
    """Add up what tap `name` kept. Every byte of it must be of a known call."""
    found = Heard()
    for path in sorted(capture.glob(f"{name}-*.up")):
        calls: dict[int, str] = {}
        for way, file in enumerate((path, path.with_suffix(".down"))):
            sizes: dict[int, dict[str, int]] = defaultdict(dict)
            for part in deframe(file.read_bytes()):
                assert part.framed, (file, part.name)
                if part.name == "header" and b":path: " in part.data:
                    line = part.data.split(b":path: ")[1].split(b"\n")[0]
                    calls[part.stream] = line.rpartition(b"/")[2].decode()
                sizes[part.stream][part.name] = len(part.data)
            for stream in sizes.keys() - {0}:
                found.bytes[way] += sum(sizes[stream].get(name, 0) for name in CARRIES[calls[stream]][way])
                found.strange += sizes[stream].get("field 99", 0)
        found.calls.update(calls.values())
    return found


def recorded(ledger: Iterable[dict[str, Any]]) -> Heard:
    """What a tap must have heard by an owner's ledger if no call was repeated."""
    found = Heard()
    names = {
        ("parcel", "out"): "Upload",
        ("parcel", "in"): "Download",
        ("receipt", "out"): "Acknowledge",
        ("checkpoint", "out"): "AddCheckpoint",
        ("checkpoint", "in"): "GetCheckpoint",
    }
    for body in ledger:
        if body["channel"] == "data":
            found.bytes[body["direction"] == "in"] += body["size_bytes"]
            found.calls[names.get((body["type"], body["direction"]), "")] += 1
    found.calls["GetCheckpoint"] -= found.calls["AddCheckpoint"]  # whose answers came in, too
    del found.calls[""]  # a receipt that came in is the answer to an upload
    return found
