"""Catalogs in CSV: read as Parquet is, or refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.catalog import Catalog
from common.errors import DataError
from server.engine.catalogs import read_catalog


def test_csv_is_read_as_parquet_is(tmp_path: Path) -> None:
    wanted = Catalog("toys-2018", ["a", "b"], {"title": ['oak "spoon"', "cup"], "brand": ["acme, inc", ""]})
    wanted.write(tmp_path / "toys-2018.parquet")
    text = 'item_id,title,brand\r\na,"oak ""spoon""","acme, inc"\r\n\r\nb,cup,\r\n'
    (tmp_path / "Toys 2018.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_catalog(tmp_path / "Toys 2018.csv") == wanted
    assert read_catalog(tmp_path / "toys-2018.parquet") == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,title\na,ball\nb\n", "line 3 has 1 cells, not 2"),
        ("id,title\na,ball\n", "its header has no item_id, or a name twice"),
        ("item_id,title,title\na,ball,x\n", "its header has no item_id, or a name twice"),
        ("item_id,Title\na,ball\n", "attribute name 'Title' is not a lower-case word"),
        ("item_id,title\na,ball\na,bat\n", "item_id in row 1 is repeated"),
        ("item_id,title\na,ball\nb,\n", "the item in row 1 has no text"),
        ("item_id\na\n", "no attribute columns"),
        ("item_id,title\n", "no items"),
        ("", "its header has no item_id"),
        ('item_id,title\na,"ball\n', "is not CSV in UTF-8: unexpected end of data"),
        ("item_id,title\na,\xff\n", "is not CSV in UTF-8"),
    ],
)
def test_what_is_no_catalog_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"items.csv: {message}"):
        read_catalog(path)


def test_a_catalog_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv: no such catalog"):
        read_catalog(tmp_path / "none.csv")
