"""A TCP relay on loopback that a test puts before a port: slow when asked, and cut when asked."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHUNK_BYTES = 32 << 10
BUFFER_BYTES = 64 << 10  # small, so that what is counted has nearly arrived


class Relay:
    """Relays connections to `target`; counts what each one carried towards it.

    `rate` is bytes a second towards the target (0: unlimited). Once `cut_after` bytes in all went that
    way, every connection is cut, once.
    """

    def __init__(self, target: int, *, rate: int = 0, cut_after: int = 0) -> None:
        self._target, self.rate, self._cut_after = target, rate, cut_after
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._open: list[socket.socket] = []
        self._guard = threading.Lock()
        self.carried: list[int] = []
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def total(self) -> int:
        """Bytes towards the target over all connections."""
        return sum(self.carried)

    def cut(self) -> None:
        """Break every connection; new ones are taken again."""
        with self._guard:
            broken, self._open = self._open, []
        for end in broken:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Stop listening and break every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                with self._guard:
                    self._open += [near, far]
                    self.carried.append(0)
                    number = len(self.carried) - 1
                for source, sink, count in ((near, far, number), (far, near, None)):
                    threading.Thread(target=self._pump, args=(source, sink, count), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                sink.sendall(chunk)
                if number is not None:
                    self._count(number, len(chunk))
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, number: int, size_bytes: int) -> None:
        self.carried[number] += size_bytes
        if self._cut_after and self.total >= self._cut_after and not self.cuts:
            self.cuts += 1
            self.cut()
        if self.rate:
            time.sleep(size_bytes / self.rate)
