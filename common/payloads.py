"""What can be said of a payload file by reading it: the facts that gate and admission decide on.

Both shores read payloads with the same strict code and in constant memory; the decisions are in
`clients.egress` and `server.admission`. JSON payloads are flat objects in one exact form: metric values
are rounded to `METRIC_DECIMALS`, so that no message fits into their low digits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.catalog import Catalog
from common.errors import DataError, ParcelError, RefusedError
from common.files import sha256_file
from common.parcels import Header, Kind
from common.statements import CODE_PATTERN, DIGEST_PATTERN
from common.tensorfile import TensorReading, read_tensors

METRIC_DECIMALS = 6
MAX_JSON_BYTES = 256 << 10
METRIC_NAME = re.compile(r"[a-z0-9][a-z0-9@_./:-]{0,79}")
CANDIDATES = "candidates"  # of a fitness: the digest of the numbers that it answers
THOUSANDTHS = 1000  # what the losses of a fitness are whole numbers of
_CODE, _DIGEST = re.compile(CODE_PATTERN), re.compile(DIGEST_PATTERN)
JsonFacts = dict[str, int | float | str]


@dataclass(frozen=True)
class PayloadFacts:
    """What a payload file is, whatever its header claims."""

    digest: str
    size_bytes: int
    tensors: tuple[TensorReading, ...] = ()
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    catalog_domain: str = ""

    @property
    def norm(self) -> float:
        """L2 norm over all tensors."""
        return math.sqrt(sum(reading.norm**2 for reading in self.tensors))


def inspect(path: Path, header: Header) -> PayloadFacts:
    """Read the payload of `header` once or twice, streaming.

    Raises VectorError, DataError or ParcelError when it is not a well-formed file of the header's kind;
    whether its content is what the header says is for the caller to decide.
    """
    digest, size_bytes = sha256_file(path), path.stat().st_size
    if header.kind.holds_tensors:
        return PayloadFacts(digest, size_bytes, tensors=tuple(read_tensors(path)))
    if header.kind is Kind.CATALOG:
        return PayloadFacts(digest, size_bytes, catalog_domain=Catalog.read(path).domain)
    if size_bytes > MAX_JSON_BYTES:
        raise ParcelError(f"{header.kind} payload: {size_bytes} bytes, at most {MAX_JSON_BYTES} are allowed")
    return PayloadFacts(digest, size_bytes, values=decode_values(path.read_bytes()))


def check_tensors(header: Header, facts: PayloadFacts, *, max_norm: float) -> None:
    """Raises RefusedError unless the tensors are those of the header, finite, and within the norm."""
    claimed = {fact.name: (fact.shape, fact.dtype, fact.digest) for fact in header.tensors}
    for reading in facts.tensors:
        if claimed.get(reading.name) != (reading.shape, reading.dtype, reading.digest):
            raise problem("tensor-table", f"tensor {reading.name}: differs from the header's table")
        if reading.dtype != header.codec.dtype:
            raise problem("tensor-table", f"tensor {reading.name}: dtype is not that of the codec")
        if not reading.finite:
            raise problem("not-finite", f"tensor {reading.name}: holds NaN or infinity")
    missing = sorted(set(claimed) - {reading.name for reading in facts.tensors})
    if missing:
        raise problem("tensor-table", f"tensor {missing[0]}: in the header, not in the file")
    if not 0 < facts.norm <= max_norm:
        raise problem("norm", f"L2 norm {facts.norm:.6g}: must be above 0 and at most {max_norm:g}")


def check_table(header: Header, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises RefusedError unless the header's table has exactly `expected` names and shapes."""
    table = {fact.name: fact.shape for fact in header.tensors}
    for name in sorted(set(expected) - set(table)):
        raise problem("tensor-table", f"tensor {name}: missing")
    for name in sorted(set(table) - set(expected)):
        raise problem("tensor-table", f"tensor {name}: not one that may be trained")
    for fact in header.tensors:
        if fact.shape != tuple(expected[fact.name]):
            raise problem(
                "tensor-table",
                f"tensor {fact.name}: shape {list(fact.shape)}, expected {list(expected[fact.name])}",
            )
        if fact.dtype != header.codec.dtype:
            raise problem(
                "tensor-table", f"tensor {fact.name}: dtype {fact.dtype}, expected {header.codec.dtype}"
            )


def fitness_values(candidates: str, losses_e3: Iterable[int]) -> JsonFacts:
    """A fitness: the digest of the file of candidates, and the loss of each in thousandths."""
    return {CANDIDATES: candidates, **{f"{n:04d}/loss_e3": loss for n, loss in enumerate(losses_e3)}}


def check_fitness(values: Mapping[str, int | float | str]) -> None:
    """Raises RefusedError unless this is the digest of candidates and a whole number, 0 or more, of each."""
    digest = str(values.get(CANDIDATES, ""))
    losses = {name: value for name, value in values.items() if name != CANDIDATES}
    if (
        not losses
        or values.keys() != fitness_values(digest, range(len(losses))).keys()
        or not _DIGEST.fullmatch(digest)
    ):
        raise problem("metrics", "fitness: not `candidates` and a loss of each, numbered from 0000")
    if not all(type(value) is int and value >= 0 for value in losses.values()):
        raise problem("metrics", "fitness: a loss is not a whole number, 0 or more")


def encode_values(values: Mapping[str, int | float | str]) -> bytes:
    """The only form of a JSON payload: sorted, compact, metric values rounded. Raises ParcelError."""
    data = json.dumps(
        {name: _rounded(value) for name, value in values.items()}, sort_keys=True, separators=(",", ":")
    ).encode("ascii")
    decode_values(data)
    return data


def decode_values(data: bytes) -> JsonFacts:
    """Read a JSON payload strictly. Raises ParcelError naming the field, never showing its value."""
    try:
        values = json.loads(data.decode("ascii"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ParcelError("JSON payload: not strict JSON") from None
    if not isinstance(values, dict) or not values:
        raise ParcelError("JSON payload: must be a non-empty object")
    for name, value in values.items():
        if not METRIC_NAME.fullmatch(name):
            raise ParcelError("JSON payload: a name is not lower-case letters, digits and @_./:-")
        check_value(name, value)
    if json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii") != data:
        raise ParcelError("JSON payload: not in its only form (sorted, compact, each name once)")
    return values


def check_value(name: str, value: object) -> None:
    """Raises ParcelError unless `value` is a whole number, a rounded finite number, a code or a digest."""
    if type(value) is int and abs(value) < 2**53:
        return
    if type(value) is float and math.isfinite(value) and round(value, METRIC_DECIMALS) == value:
        return
    if type(value) is str and (_CODE.fullmatch(value) or _DIGEST.fullmatch(value)):
        return
    raise ParcelError(
        f"field {name}: neither a whole number, a finite number of {METRIC_DECIMALS} decimals, a code "
        "nor a digest"
    )


def problem(reason: str, message: str) -> RefusedError:
    """A refusal with its stable code."""
    return RefusedError(message, reason=reason)


def _rounded(value: int | float | str) -> int | float | str:
    return round(value, METRIC_DECIMALS) if isinstance(value, float) else value


def _refuse(_: str) -> float:
    raise DataError("not a finite number")
