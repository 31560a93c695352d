"""Lines of text files, plain or gzip, with their numbers; JSON lines with the place of every fault."""

from __future__ import annotations

import ast
import gzip
import io
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from clients.data.records import Issues, Place
from common.errors import DataError
from common.progress import NO_REPORT, Report

MAX_LINE_BYTES = 64 * 2**20
_REPORT_EVERY = 20_000
_TOO_MUCH = "nested too deep, or a number of thousands of digits"


def open_bytes(path: Path) -> IO[bytes]:
    """Open `path` for reading, as gzip when its first bytes say so. Raises DataError when it cannot."""
    try:
        with path.open("rb") as raw:
            magic = raw.read(2)
        return cast(IO[bytes], gzip.open(path)) if magic == b"\x1f\x8b" else path.open("rb")
    except OSError as err:
        raise DataError(f"{path}: cannot read: {err.strerror}", next_step="check the path") from None


def bare_name(path: Path) -> str:
    """The file name without `.gz`."""
    return path.name.removesuffix(".gz")


def byte_lines(path: Path, report: Report = NO_REPORT) -> Iterator[tuple[int, bytes]]:
    """`(line number from 1, line without its end)`; blank lines are skipped but counted.

    Raises DataError at the line where a gzip stream is cut or damaged, or a line exceeds 64 MiB.
    """
    number, total = 0, path.stat().st_size if path.exists() else 0
    with open_bytes(path) as file:
        raw = file.fileobj if isinstance(file, gzip.GzipFile) else file
        try:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise DataError(f"{path.name}:{number}: a line longer than {MAX_LINE_BYTES} bytes")
                if number % _REPORT_EVERY == 0:
                    report(phase=f"read {path.name}", step=raw.tell() if raw else 0, total=total)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise DataError(
                f"{path.name}:{number + 1}: the gzip file is cut or damaged here",
                next_step="fetch or copy the file again",
            ) from None
        except OSError as err:
            raise DataError(
                f"{path.name}:{number + 1}: cannot read on: {err.strerror}", next_step="check the disk"
            ) from None
    report(phase=f"read {path.name}", step=total, total=total)


def text_lines(
    path: Path, issues: Issues, report: Report = NO_REPORT, encoding: str = "utf-8"
) -> Iterator[tuple[int, str]]:
    """As `byte_lines`, decoded; a line that is not `encoding` is a corrupt line."""
    for number, line in byte_lines(path, report):
        try:
            yield number, line.decode(encoding)
        except UnicodeDecodeError as err:
            what = f"not valid {encoding} text"
            issues.add("corrupt-lines", Place(path.name, number, err.start + 1), what)


def json_lines(
    path: Path, issues: Issues, report: Report = NO_REPORT, *, python_literals: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(line number, object)` of a JSON-lines file; what is not a JSON object is a corrupt line.

    `python_literals` also takes lines written as Python dicts (Amazon 2014 metadata), read by
    `ast.literal_eval`: constants only, nothing is evaluated.
    """
    for number, line in text_lines(path, issues, report):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            value = _literal(line) if python_literals else None
            if not isinstance(value, dict):
                column = err.colno if isinstance(err, json.JSONDecodeError) else 1
                why = err.msg if isinstance(err, json.JSONDecodeError) else _TOO_MUCH
                issues.add("corrupt-lines", Place(path.name, number, column), f"not valid JSON ({why})")
                continue
        if isinstance(value, dict):
            yield number, value
        else:
            issues.add("corrupt-lines", Place(path.name, number, 1), "not a JSON object")


def _literal(line: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def json_document(data: bytes, name: str) -> Any:
    """One whole JSON file. Raises DataError naming line and column; repeated keys are refused."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise DataError(f"{name}:{line}: not valid utf-8 text", next_step="fetch the file again") from None
    except json.JSONDecodeError as err:
        raise DataError(
            f"{name}:{err.lineno}:{err.colno}: not valid JSON ({err.msg})",
            next_step="mend the file, or fetch it again",
        ) from None
    except (_RepeatedKeyError, RecursionError, ValueError) as err:
        what = "a key occurs twice in one object" if isinstance(err, _RepeatedKeyError) else _TOO_MUCH
        raise DataError(f"{name}: {what}", next_step="write the file again without that") from None


class _RepeatedKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _RepeatedKeyError
    return result


def text_stream(path: Path, encoding: str = "utf-8") -> io.TextIOWrapper:
    """The whole file as text with newlines kept, as the csv module wants it."""
    return io.TextIOWrapper(
        open_bytes(path), encoding=encoding + ("-sig" if encoding == "utf-8" else ""), newline=""
    )
