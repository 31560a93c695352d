"""The catalog file: what it holds, and what its strict reader refuses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.catalog import Catalog
from common.errors import DataError

META = {"isthmus.catalog": "1", "isthmus.domain": "toys"}


def test_round_trip_and_texts(tmp_path: Path) -> None:
    catalog = Catalog("toys", ["b", "a"], {"title": ["Ball", "Duck"], "brand": ["", "Acme"]})
    catalog.write(tmp_path / "a.parquet")
    catalog.write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert Catalog.read(tmp_path / "a.parquet") == catalog
    assert catalog.texts(("brand", "title", "nope")) == [["title: Ball"], ["brand: Acme", "title: Duck"]]
    with pytest.raises(DataError, match="row 0 has no text in brand"):
        catalog.texts(("brand",))


@pytest.mark.parametrize(
    ("ids", "attributes", "match"),
    [
        ([], {"title": []}, "no items"),
        (["a"], {}, "no attribute"),
        (["a", "a"], {"title": ["x", "y"]}, "row 1 is repeated"),
        ([""], {"title": ["x"]}, "row 0 is empty"),
        (["a"], {"title": [""], "brand": [""]}, "row 0 has no text"),
        (["a"], {"title": ["x", "y"]}, "has 2 rows, expected 1"),
        (["a"], {"Title": ["x"]}, "not a lower-case word"),
        (["a"], {"item_id": ["x"]}, "not a lower-case word"),
        (["a"], {"title": ["x\x00"]}, "control"),
        (["a\u202e"], {"title": ["x"]}, "control or invisible"),
        (["a"], {"title": ["x" * 1001]}, "longer than 1000"),
    ],
)
def test_malformed(ids: list[str], attributes: dict[str, list[str]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        Catalog("toys", ids, attributes)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (pa.table({"item_id": ["a"], "n": [1]}), "'n' is not a plain string"),
        (pa.table({"title": ["a"], "item_id": ["a"]}), "first column must be item_id"),
        (pa.table({"item_id": ["a"], "title": pa.array([None], pa.string())}), "null"),
        (pa.table({"item_id": ["a"], "t": pa.array(["x"], pa.large_string())}), "'t' is not a plain string"),
        (pa.table({"item_id": ["a", "a"], "t": ["x", "y"]}), "repeated"),
    ],
)  # fmt: skip
def test_strict_reader(tmp_path: Path, table: pa.Table, match: str) -> None:
    pq.write_table(table.replace_schema_metadata(META), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=match) as caught:
        Catalog.read(tmp_path / "c.parquet")
    assert "c.parquet" in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [{}, {**META, "note": "hi"}, {**META, "isthmus.catalog": "2"}, {**META, "isthmus.domain": "A b"}],
)
def test_metadata_is_strict(tmp_path: Path, metadata: dict[str, str]) -> None:
    table = pa.table({"item_id": ["a"], "title": ["x"]}).replace_schema_metadata(metadata or None)
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError):
        Catalog.read(tmp_path / "c.parquet")


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match="not a readable Parquet"):
        Catalog.read(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no such catalog"):
        Catalog.read(tmp_path / "none.parquet")
