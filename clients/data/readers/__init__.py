"""One reader a format; each module has `NAME`, `matches(path)` and `read(path, issues, options)`.

Adding a format means adding a module here and one line to `FORMATS`, whose order is the order of detection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from clients.data.readers import (
    amazon2014,
    amazon2018,
    amazon2023,
    columns,
    mergerec,
    movielens,
    recbole,
)
from clients.data.readers._options import ReadOptions
from clients.data.records import Issues, Records
from common.errors import DataError

__all__ = ["FORMATS", "ReadOptions", "Reader", "detect", "read"]


class Reader(Protocol):
    """What a reader module offers."""

    NAME: str

    def matches(self, path: Path) -> bool:
        """Whether `path` looks like this format, by names alone."""

    def read(self, path: Path, issues: Issues, options: ReadOptions) -> Records:
        """Read it. Raises DataError for what `issues` does not tolerate."""


FORMATS: dict[str, Reader] = {
    module.NAME: module
    for module in (mergerec, recbole, movielens, amazon2014, amazon2018, amazon2023, columns)
}


def detect(path: Path) -> str:
    """The name of the format of `path`, told from file names. Raises DataError when none or several fit."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", next_step="check the path")
    found = [name for name, reader in FORMATS.items() if reader.matches(path)]
    if len(found) == 1:
        return found[0]
    what = f"could be {' or '.join(found)}" if found else "no known format, told by the file names"
    raise DataError(f"{path}: {what}", next_step=f"pass --format, one of {', '.join(FORMATS)}")


def read(path: Path, issues: Issues, options: ReadOptions, format_name: str | None = None) -> Records:
    """Read `path` with the reader named, or else detected."""
    name = format_name or detect(path)
    if name not in FORMATS:
        raise DataError(f"no format {name!r}", next_step=f"formats are {', '.join(FORMATS)}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", next_step="check the path")
    return FORMATS[name].read(path, issues, options)
