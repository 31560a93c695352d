"""CSV with a header, plain or gzip, with the line number of every row."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from clients.data.readers._lines import open_bytes, text_stream
from clients.data.records import Issues, Place
from common.errors import DataError
from common.progress import NO_REPORT, Report

_REPORT_EVERY = 20_000
_MAX_FIELD_CHARS = 2**20


def header(path: Path) -> list[str]:
    """The column names. Raises DataError when there is no header, or a name occurs twice."""
    with open_bytes(path) as file:
        try:
            line = file.readline(2**20).decode("utf-8-sig")
        except (UnicodeDecodeError, EOFError, OSError, zlib.error):
            raise DataError(f"{path.name}:1: the header is not readable utf-8 text") from None
    try:
        names = [
            name.strip() for name in next(csv.reader([line], delimiter=_delimiter(path), strict=True), [])
        ]
    except csv.Error as err:
        raise DataError(f"{path.name}:1: the header is not valid CSV ({err})") from None
    if not any(names) or len(set(names)) != len(names):
        raise DataError(
            f"{path.name}:1: no header, or a column name occurs twice",
            next_step="give the file a first line with one name for each column",
        )
    return names


def require(path: Path, names: Sequence[str], required: Sequence[str]) -> None:
    """Raises DataError naming the first required column that is not there."""
    for name in required:
        if name not in names:
            raise DataError(
                f"{path.name}:1: no column {name!r}; there are {', '.join(names)}",
                next_step="name the columns with --user-column, --item-column and --time-column",
            )


def csv_rows(
    path: Path, issues: Issues, report: Report = NO_REPORT, *, required: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """`(line on which the row ends, column -> text)`; a row of another width is a corrupt line."""
    names = header(path)
    require(path, names, required)
    total = path.stat().st_size
    with text_stream(path) as file:
        rows = csv.reader(file, delimiter=_delimiter(path), strict=True)
        csv.field_size_limit(_MAX_FIELD_CHARS)
        header_read = False
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as err:
                issues.add("corrupt-lines", Place(path.name, rows.line_num), f"not valid CSV ({err})")
                continue
            except UnicodeDecodeError:
                raise DataError(
                    f"{path.name}: not valid utf-8 text after line {rows.line_num}",
                    next_step="convert the file to UTF-8",
                ) from None
            except (EOFError, gzip.BadGzipFile, zlib.error):
                raise DataError(
                    f"{path.name}:{rows.line_num + 1}: the gzip file is cut or damaged here",
                    next_step="fetch or copy the file again",
                ) from None
            if not header_read or not row:
                header_read = True
                continue
            if len(row) != len(names):
                what = f"{len(row)} fields, the header has {len(names)}"
                issues.add("corrupt-lines", Place(path.name, rows.line_num), what)
                continue
            if rows.line_num % _REPORT_EVERY == 0:
                report(phase=f"read {path.name}", step=min(total, _position(file)), total=total)
            yield rows.line_num, dict(zip(names, row, strict=True))
    report(phase=f"read {path.name}", step=total, total=total)


def _position(file: object) -> int:
    buffer = getattr(file, "buffer", None)
    raw = getattr(buffer, "fileobj", buffer)
    return int(raw.tell()) if raw is not None else 0


def _delimiter(path: Path) -> str:
    return "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
