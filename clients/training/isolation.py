"""The trainer's process without a network and without the owner's keys, where Linux allows it.

Before any library for training is imported, the process moves into a user, network and mount namespace of
its own. There it has no network device that is up; the owner's home is empty but for the folders that the
job names; nothing on disk can be written outside the job's own folders; and it gives up every privilege
with which it could change that back. The process stays the same one, so whoever started it can still
end it.

It is all or nothing: a child tries it first, and where that fails (another system, a container that
forbids namespaces, Linux before 5.12) the process goes on as it is and says so.
What stays open: memory and processor time, and sockets in the file system that other programs of the same
user listen on. A user who is root on the host can read its disks as devices: run as somebody else.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import gettempdir

_NEWNS, _NEWUSER, _NEWNET = 0x00020000, 0x10000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000
_NOSUID_NODEV = 0x2 | 0x4
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 0x1
_NO_NEW_PRIVS, _CAPABILITY_VERSION = 38, 0x20080522


IMPOSSIBLE = "the policy wants the trainer isolated, and this host does not allow it"
IMPOSSIBLE_STEP = "allow user namespaces to this user, or set require_isolation = false in policy.toml"


def possible() -> bool:
    """Whether this host allows it; asked of a process of its own."""
    import subprocess

    command = [sys.executable, "-P", "-m", "clients.training.isolation"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def isolate(hidden: Path, readable: Sequence[Path], writable: Sequence[Path]) -> bool:
    """Isolate this process, which has one thread; whether it is isolated now.

    Of the folder `hidden` only what is in `readable` and `writable` remains, and on the whole host
    only `writable` can be written. All are folders that exist.
    """
    if not _try(hidden, readable, writable):
        return False
    _isolate(hidden, readable, writable)
    return True


def _try(hidden: Path, readable: Sequence[Path], writable: Sequence[Path]) -> bool:
    """Whether a child of this process could be isolated."""
    if sys.platform != "linux":
        return False
    child = os.fork()
    if child == 0:
        try:
            _isolate(hidden, readable, writable)
        except BaseException:  # noqa: BLE001 - whatever it is, it is not possible here
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _isolate(hidden: Path, readable: Sequence[Path], writable: Sequence[Path]) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    uid, gid, here = os.getuid(), os.getgid(), Path.cwd()
    _done(library.unshare(_NEWUSER | _NEWNS | _NEWNET), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    mount = _Mounts(library)
    mount(None, Path("/"), None, _RECURSIVE | _PRIVATE)
    mount.hide(hidden.resolve(), [path.resolve() for path in (*writable, *readable)])
    for path in writable:
        mount(path, path, None, _BIND | _RECURSIVE)
    mount.read_only(Path("/"), recursive=True)
    for path in writable:
        mount.read_only(path, recursive=False, clear=True)
    os.chdir(here)  # the old directory is of the mounts outside, from which `..` leads everywhere
    _done(library.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _done(library.capset(header, nothing), "capset")


class _Mounts:
    """mount(2) and mount_setattr(2); each raises OSError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, source: Path | None, target: Path, kind: bytes | None, flags: int) -> None:
        where = None if source is None else os.fsencode(source)
        _done(self._library.mount(where, os.fsencode(target), kind, ctypes.c_ulong(flags), None), str(target))

    def hide(self, folder: Path, kept: Iterable[Path]) -> None:
        """Put an empty file system over `folder`; those of `kept` that are in it stay where they are."""
        inside = sorted({path for path in kept if path.is_relative_to(folder) and path.is_dir()})
        outermost = [path for path in inside if not any(other in path.parents for other in inside)]
        held = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in outermost}
        self(Path("none"), folder, b"tmpfs", _NOSUID_NODEV)
        for path, descriptor in held.items():
            path.mkdir(parents=True)
            self(Path(f"/proc/self/fd/{descriptor}"), path, None, _BIND | _RECURSIVE)
            os.close(descriptor)

    def read_only(self, path: Path, *, recursive: bool, clear: bool = False) -> None:
        attributes = (ctypes.c_uint64 * 4)(0 if clear else _ATTR_RDONLY, _ATTR_RDONLY if clear else 0, 0, 0)
        flags = _AT_RECURSIVE if recursive else 0
        call = self._library.syscall
        result = call(
            _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, ctypes.sizeof(attributes)
        )
        _done(result, str(path))


def _done(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


if __name__ == "__main__":
    os.chdir("/")
    raise SystemExit(0 if _try(Path(gettempdir()), [], []) else 1)
