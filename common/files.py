"""Small file habits that everything here shares: whole or not at all, and a full disk said plainly.

`write_atomic` leaves either the old file or the new one, durably; `replace_folder` does it for folders.
`storage_errors` turns what a full or failing disk raises into `StorageError`, so that callers refuse instead
of crashing half-way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import IsthmusError, StorageError

CHUNK_BYTES = 1 << 20
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Raise StorageError instead of the OSErrors that mean "this disk cannot take it"."""
    try:
        yield
    except OSError as err:
        if isinstance(err, StorageError) or err.errno not in _DISK_ERRORS:
            raise
        problem = StorageError(
            f"{where}: cannot write: {os.strerror(err.errno or 0)}",
            next_step="free space on that disk and start again; nothing half-written was kept",
        )
        raise problem from err


@contextlib.contextmanager
def named_os_errors() -> Iterator[None]:
    """Raise StorageError instead of any OSError that names a file: one may not be read, or lie in the way."""
    try:
        yield
    except OSError as err:
        if isinstance(err, IsthmusError) or not err.filename:
            raise
        raise StorageError(
            f"{err.filename}: {os.strerror(err.errno or 0)}",
            next_step="check that path and who may read or write it",
        ) from err


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until every byte is taken."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write `data` to `path` with fsync, whole or not at all.

    `mode` holds from the first byte on (keys are never readable by others, not even for a moment).
    With `replace=False` an existing file is left alone and FileExistsError raised.
    Raises StorageError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with storage_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if replace:
                temporary.replace(path)
            else:
                path.hardlink_to(temporary)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(stage: Path, out: Path, *, durable: bool = True) -> None:
    """Put the finished folder `stage` in the place of `out`, which may exist, by renames.

    The old folder goes only after the new one stands. Between the two renames it is `.NAME.old` beside it;
    `restore_folder` brings it back after a kill there. With `durable` the names are on the disk afterwards.
    Raises StorageError when the disk cannot take it.
    """
    old = _set_aside(out)
    with storage_errors(out):
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        try:
            stage.replace(out)
        except OSError:
            restore_folder(out)
            raise
        if durable:
            fsync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(out: Path) -> None:
    """Bring back what a `replace_folder` that was killed half-way had set aside."""
    if _set_aside(out).is_dir() and not out.exists():
        _set_aside(out).replace(out)


def _set_aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def sha256_bytes(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, in constant memory."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def copy_hashed(source: Path, target: Path) -> tuple[str, int]:
    """Copy `source` to a new file `target` durably; returns (SHA-256, bytes) of what was copied.

    `target` appears only when it is complete. Raises StorageError when the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    digest, size_bytes = hashlib.sha256(), 0
    with storage_errors(target):
        try:
            with source.open("rb") as reader:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    while chunk := reader.read(CHUNK_BYTES):
                        write_all(descriptor, chunk)
                        digest.update(chunk)
                        size_bytes += len(chunk)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            temporary.replace(target)
            fsync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest(), size_bytes
