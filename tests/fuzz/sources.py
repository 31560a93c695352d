"""Decoders of an owner's data, as it was fetched from somewhere, and of the domain folders made of it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clients.data import readers
from clients.data.domain import Domain
from clients.data.records import KINDS, Issues
from fuzz.decoders import DECODERS, Decoder, Make, encoded


def _rows(separator: str, *rows: tuple[str, ...]) -> bytes:
    return "".join(separator.join(row) + "\n" for row in rows).encode()


_TRIPLES = [(f"u{user}", f"i{item}", str(1000 + 10 * user + item)) for user in range(3) for item in range(4)]
_REVIEWS = b"".join(
    encoded({"reviewerID": u, "asin": i, "unixReviewTime": int(t)}) + b"\n" for u, i, t in _TRIPLES
)
_METADATA = b"".join(
    encoded({"asin": f"i{n}", "title": f"<b>oak</b> spoon {n}", "brand": "by x", "category": ["a", "b"]})
    + b"\n"
    for n in range(4)
)
_NEW = b"".join(
    encoded({"user_id": u, "parent_asin": i, "timestamp": int(t)}) + b"\n" for u, i, t in _TRIPLES
)
_NEW_ITEMS = b"".join(
    encoded(
        {"parent_asin": f"i{n}", "title": "oak", "store": "x", "categories": ["a"], "details": {"Brand": "y"}}
    )
    + b"\n"
    for n in range(4)
)
_NUMBERED = {
    "meta_data.json": {f"i{n}": {"title": "oak", "brand": "x", "category": "a"} for n in range(4)},
    "smap.json": {f"i{n}": n for n in range(4)},
    "umap.json": {f"u{n}": n for n in range(3)},
    "train.json": {str(n): [0, 1] for n in range(3)},
    "val.json": {str(n): [2] for n in range(3)},
    "test.json": {str(n): [3] for n in range(3)},
}


def _table(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _archive() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in _NUMBERED.items():
            member = tarfile.TarInfo(f"x/{name}")
            member.size = len(encoded(content))
            archive.addfile(member, io.BytesIO(encoded(content)))
    return sink.getvalue()


_USERS, _ITEMS, _TIMES = (list(column) for column in zip(*_TRIPLES, strict=True))
SOURCES: dict[str, tuple[str, dict[str, bytes]]] = {  # name: format, files; each file is fuzzed
    "csv": (
        "columns",
        {
            "interactions.csv": _rows(",", ("user_id", "item_id", "timestamp"), *_TRIPLES),
            "items.csv": _rows(",", ("item_id", "title"), *((f"i{n}", f'"oak, {n}"') for n in range(4))),
        },
    ),
    "jsonl": (
        "columns",
        {"interactions.jsonl": _NEW, "items.jsonl": _NEW_ITEMS},
    ),
    "parquet": (
        "columns",
        {
            "interactions.parquet": _table(
                user_id=_USERS, item_id=_ITEMS, timestamp=[int(t) for t in _TIMES]
            ),
            "items.parquet": _table(item_id=[f"i{n}" for n in range(4)], title=["oak"] * 4),
        },
    ),
    "recbole": (
        "recbole",
        {
            "x.inter": _rows("\t", ("user_id:token", "item_id:token", "timestamp:float"), *_TRIPLES),
            "x.item": _rows(
                "\t", ("item_id:token", "item_name:token_seq"), *((f"i{n}", "oak") for n in range(4))
            ),
        },
    ),
    "movielens": (
        "movielens",
        {
            "ratings.dat": _rows("::", *((u, i, "5", t) for u, i, t in _TRIPLES)),
            "movies.dat": _rows("::", *((f"i{n}", "Oak (1990)", "Drama|War") for n in range(4))),
        },
    ),
    "amazon2014": (
        "amazon2014",
        {
            "reviews_X_5.json": _REVIEWS,
            "meta_X.json": b"".join(
                b"{'asin': 'i%d', 'title': 'oak', 'categories': [['a', 'b'], ['c']]}\n" % n for n in range(4)
            ),
        },
    ),
    "amazon2018": ("amazon2018", {"X_5.json": _REVIEWS, "meta_X.json": _METADATA}),
    "amazon2023": ("amazon2023", {"X.jsonl": _NEW, "meta_X.jsonl": _NEW_ITEMS}),
    "mergerec": ("mergerec", {name: encoded(content) for name, content in _NUMBERED.items()}),
    "mergerec-archive": ("mergerec", {"x.tar.gz": _archive()}),
}


def _reader(source: str, name: str) -> Make:
    format_name, files = SOURCES[source]

    def make(folder: Path) -> Decoder:
        for other, content in files.items():
            (folder / other).write_bytes(content)
        where = folder / name if name.endswith(".gz") else folder

        def read(data: bytes) -> None:
            (folder / name).write_bytes(data)
            options = readers.ReadOptions()
            found = readers.read(where, Issues(KINDS), options, format_name)
            rows = found.interactions
            assert len(rows.user_N) == len(rows.item_N) == len(rows.time_N) == len(rows.line_N) > 0
            assert np.isfinite(rows.time_N).all()
            assert all(len(text) <= 1000 for row in found.items.rows.values() for text in row.values())

        return Decoder((files[name],), read)

    return make


for _source, (_, _files) in SOURCES.items():
    for _name in _files:
        DECODERS[f"data-{_source}-{_name.split('.')[0].replace('_', '-')}"] = _reader(_source, _name)


def _domain_file(name: str) -> Make:
    def make(folder: Path) -> Decoder:
        one = np.array([0, 1], dtype=np.int32)
        domain = Domain(
            name="toys", item_ids=["a", "b"], attributes={"title": ["oak", "red"]}, user_ids=["u", "v"],
            train=[one, one], valid=one, test=one, public_attributes=("title",),
        )  # fmt: skip
        domain.save(folder / "toys")
        sample = (folder / "toys" / name).read_bytes()

        def read(data: bytes) -> None:
            (folder / "toys" / name).write_bytes(data)
            assert Domain.load(folder / "toys").interactions > 0

        return Decoder((sample,), read)

    return make


for _name in ("domain.json", "items.parquet", "sequences.parquet"):
    DECODERS[f"domain-folder-{_name.split('.')[0]}"] = _domain_file(_name)
