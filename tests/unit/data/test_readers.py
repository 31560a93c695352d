"""Each reader on a tiny source that the test writes, and each fault with its place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.data.readers import ReadOptions, detect, read
from clients.data.records import KINDS, Issues, Records, clean_text, parse_time
from common.errors import DataError

SECRET = "userSecret77"


def lines(path: Path, rows: list[object], *, gz: bool = False) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    return path


def load(path: Path, **options: object) -> Records:
    return read(path, Issues(), ReadOptions(**options))  # type: ignore[arg-type]


def events(records: Records) -> list[tuple[str, str, float]]:
    table = records.interactions
    return [
        (table.user_ids[u], table.item_ids[i], float(t))
        for u, i, t in zip(table.user_N, table.item_N, table.time_N, strict=True)
    ]


def amazon2014(folder: Path) -> None:
    rows = [{"reviewerID": SECRET, "asin": f"B{n}", "unixReviewTime": 100 + n} for n in range(2)]
    lines(folder / "reviews_Toys_5.json.gz", list(rows), gz=True)
    meta = [
        r"{'asin': 'B0', 'title': 'It\'s a &quot;Duck&quot;', 'brand': 'Nature&#39;s', "
        "'categories': [['Toys'], ['Toys', 'Bath']]}",
        {"asin": "B1", "title": "Ball", "categories": [["Toys", "Balls"]]},
        {"asin": "B9", "title": "unused"},
    ]
    lines(folder / "meta_Toys.json.gz", meta, gz=True)


def amazon2018(folder: Path) -> None:
    rows = [{"reviewerID": SECRET, "asin": f"B{n}", "unixReviewTime": 100 + n} for n in range(2)]
    lines(folder / "Toys_5.json.gz", list(rows), gz=True)
    meta = [
        {"asin": "B0", "title": "It's a <b>\"Duck\"</b>", "brand": "by\n  \nNature's",
         "category": ["Toys", "Bath"]},
        {"asin": "B0", "title": "second row", "brand": "x"},
        {"asin": "B1", "title": "<span class='a-size-medium", "brand": "Ball", "category": ["Toys", "Balls"]},
    ]  # fmt: skip
    lines(folder / "meta_Toys.json.gz", list(meta), gz=True)


def amazon2023(folder: Path) -> None:
    text = f"user_id,parent_asin,rating,timestamp\n{SECRET},B0,5.0,100\n{SECRET},B1,1.0,101\n"
    (folder / "Toys.csv").write_text(text)
    meta = [
        {"parent_asin": "B0", "title": "It's a \"Duck\"", "store": "x", "details": {"Brand": "Nature's"},
         "categories": ["Toys", "Bath"], "main_category": "Toys"},
        {"parent_asin": "B1", "title": "Ball", "store": "S", "categories": [], "main_category": "Toys"},
    ]  # fmt: skip
    lines(folder / "meta_Toys.jsonl", list(meta))


def recbole(folder: Path) -> None:
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    lines(folder / "toys.inter", [head, f"{SECRET}\tB0\t5\t100", f"{SECRET}\tB1\t4\t101.0"])
    head = "item_id:token\titem_name:token_seq\tprice:float\tbrand:token\tcategories:token_seq"
    rows = ["B0\tIt's a \"Duck\"\t3\tNature's\tToys, Bath", "B1\tBall\t4\t\tToys, Balls"]
    lines(folder / "toys.item", [head, *rows])


def columns_csv(folder: Path) -> None:
    text = f"who,item_id,when\n{SECRET},B0,2020-01-01\n{SECRET},B1,2020-01-02T03:00:00Z\n"
    (folder / "interactions.csv").write_text(text)
    text = 'item_id,product,brand,category\nB0,"It\'s a ""Duck""",Nature\'s,"Toys, Bath"\nB1,Ball,,Toys\n'
    (folder / "items.csv").write_text(text)


SOURCES: list[tuple[str, Callable[[Path], None], dict[str, object]]] = [
    ("amazon2014", amazon2014, {}),
    ("amazon2018", amazon2018, {}),
    ("amazon2023", amazon2023, {}),
    ("recbole", recbole, {}),
    ("columns", columns_csv, {"user_column": "who", "time_column": "when", "attributes":
        {"title": "product", "brand": "brand", "category": "category"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "options"), SOURCES, ids=[s[0] for s in SOURCES])
def test_reader_gives_the_same_records(
    tmp_path: Path, name: str, write: Callable[[Path], None], options: dict[str, object]
) -> None:
    write(tmp_path)
    assert detect(tmp_path) == name
    records = load(tmp_path, **options)
    assert records.format == name and not records.presplit
    assert [event[:2] for event in events(records)] == [(SECRET, "B0"), (SECRET, "B1")]
    assert records.interactions.time_N[0] < records.interactions.time_N[1]
    assert records.items.rows["B0"]["title"] == 'It\'s a "Duck"'
    assert records.items.rows["B0"]["brand"] == "Nature's"
    assert records.items.rows["B0"]["category"] == "Toys, Bath"
    assert "B9" not in records.items.rows


def test_amazon_details(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    records = load(tmp_path)
    assert records.items.repeated == 1
    assert "title" not in records.items.rows["B1"]  # scraped markup is no title
    (tmp_path / "b").mkdir()
    amazon2023(tmp_path / "b")
    row = load(tmp_path / "b").items.rows["B1"]
    assert row == {"title": "Ball", "brand": "S", "category": "Toys", "main_category": "Toys"}


def test_amazon2023_reviews_as_jsonl(tmp_path: Path) -> None:
    amazon2023(tmp_path)
    (tmp_path / "Toys.csv").unlink()
    row = {"user_id": SECRET, "parent_asin": "B0", "timestamp": 1588687728923, "text": "x"}
    lines(tmp_path / "Toys.jsonl.gz", [row], gz=True)
    assert events(load(tmp_path)) == [(SECRET, "B0", 1588687728923.0)]


@pytest.mark.parametrize("release", ["100k", "1m", "25m"])
def test_movielens(tmp_path: Path, release: str) -> None:
    if release == "100k":
        (tmp_path / "u.data").write_text("7\t1\t5\t881250949\n")
        flags = "|".join("1" if n in (3, 5) else "0" for n in range(19))
        row = f"1|Am\xe9lie (2001)|01-Jan-2001||http://x|{flags}\n"
        (tmp_path / "u.item").write_bytes(row.encode("latin-1"))
    elif release == "1m":
        (tmp_path / "ratings.dat").write_text("7::1::5::881250949\n")
        (tmp_path / "movies.dat").write_bytes("1::Am\xe9lie (2001)::Animation|Comedy\n".encode("latin-1"))
    else:
        (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n7,1,5.0,881250949\n")
        (tmp_path / "movies.csv").write_text(
            "movieId,title,genres\n1,Amélie (2001),Animation|Comedy\n", "utf-8"
        )
    assert detect(tmp_path) == "movielens"
    records = load(tmp_path)
    assert events(records) == [("7", "1", 881250949.0)]
    assert records.items.rows["1"] == {"title": "Amélie (2001)", "category": "Animation, Comedy"}


def mergerec(folder: Path) -> Path:
    folder.mkdir()
    content = {
        "meta_data": {key: {"title": key.lower(), "brand": "", "category": ""} for key in "XYZ"},
        "smap": {"Y": 0, "X": 1},
        "umap": {"u": 0, SECRET: 1, "short": 2},
        "train": {"0": [0, 0], "1": [1], "2": [1]},
        "val": {"0": [1], "1": [0]},
        "test": {"0": [0], "1": [1]},
    }  # fmt: skip
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    return folder


@pytest.mark.parametrize("archive", [False, True])
def test_mergerec(tmp_path: Path, archive: bool) -> None:
    path = mergerec(tmp_path / "Toys")
    if archive:
        with tarfile.open(tmp_path / "toys.tar.gz", "w:gz") as file:
            file.add(path, "Toys")
        path = tmp_path / "toys.tar.gz"
    assert detect(path) == "mergerec"
    issues = Issues()
    records = read(path, issues, ReadOptions())
    assert records.presplit and records.unsplit_users == (2,)
    assert [e[:2] for e in events(records)][:4] == [("u", "Y"), ("u", "Y"), ("u", "X"), ("u", "Y")]
    assert set(records.items.rows) == {"X", "Y"} and records.items.unused == 1
    assert "1 keys are not in smap.json" in issues.notes[0]


def test_mergerec_faults(tmp_path: Path) -> None:
    path = mergerec(tmp_path / "Toys")
    (path / "train.json").write_text('{\n "0": [0],\n "1": [1,,]\n}')
    with pytest.raises(DataError, match=r"train\.json:3:\d+: not valid JSON"):
        load(path)
    (path / "train.json").write_text('{"0": [0], "1": [9]}')
    with pytest.raises(DataError, match=r"train\.json: entry 2: an item number that is not in smap"):
        load(path)
    (path / "smap.json").write_text('{"Y": 0, "X": 0}')
    with pytest.raises(DataError, match=r"smap\.json: entry 2"):
        load(path)
    (path / "smap.json").write_text('{"Y": 0, "Y": 1}')
    with pytest.raises(DataError, match="a key occurs twice"):
        load(path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.add(path / "smap.json", "smap.json")
    (tmp_path / "part.tar.gz").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"part\.tar\.gz: meta_data\.json is not in it"):
        load(tmp_path / "part.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(DataError, match=r"cut\.tar\.gz: cannot read as an archive"):
        load(tmp_path / "cut.tar.gz")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_other_tables(tmp_path: Path, kind: str) -> None:
    rows = [{"user": 1, "item": "a", "time": 5}, {"user": 1, "item": "b", "time": 4}]
    items = [{"item": "a", "Title": "A"}, {"item": "b", "Title": "B"}]
    for name, table in (("interactions", rows), ("items", items)):
        if kind == "jsonl":
            lines(tmp_path / f"{name}.jsonl", list(table))
        else:
            pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
    records = load(tmp_path)
    assert events(records) == [("1", "a", 5.0), ("1", "b", 4.0)]
    assert records.items.rows == {"a": {"title": "A"}, "b": {"title": "B"}}
    assert records.interactions.place(1).unit == ("line" if kind == "jsonl" else "row")
    assert [e[2] for e in events(load(tmp_path, file_order=True))] == [1.0, 2.0]


def test_parquet_timestamps_keep_their_order(tmp_path: Path) -> None:
    moments = pa.array([10**18 + 1000, 10**18], pa.timestamp("ns"))
    table = pa.table({"user": ["u", "u"], "item": ["a", "b"], "time": moments})
    pq.write_table(table, tmp_path / "interactions.parquet")
    lines(tmp_path / "items.jsonl", [{"item": "a", "title": "A"}])
    assert [e[2] for e in events(load(tmp_path))] == [1e18 + 1000, 1e18]


def _replace(path: Path, line: int, text: bytes) -> None:
    data = path.read_bytes()
    raw = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    raw[line - 1] = text
    path.write_bytes(gzip.compress(b"\n".join(raw)) if path.suffix == ".gz" else b"\n".join(raw))


FAULTS = [
    (amazon2014, "reviews_Toys_5.json.gz", b'{"reviewerID": "userSecret77", oops', r":2:\d+: not valid JSON"),
    (amazon2014, "reviews_Toys_5.json.gz", b'["userSecret77"]', r":2:1: not a JSON object"),
    (amazon2014, "reviews_Toys_5.json.gz", b'{"reviewerID": "userSecret77"}', r":2: user or item is missing"),
    (amazon2014, "reviews_Toys_5.json.gz", b'{"reviewerID":"userSecret77","asin":"B1","unixReviewTime":"x"}',
     r":2: bad timestamp"),
    (amazon2014, "meta_Toys.json.gz", b"{'asin': __import__('os')}", r":2:\d+: not valid JSON"),
    (amazon2014, "meta_Toys.json.gz", b'{"title": "\xff"}', r":2:12: not valid utf-8"),
    (amazon2023, "Toys.csv", b"userSecret77,B0", r"Toys\.csv:2: 2 fields, the header has 4"),
    (amazon2023, "Toys.csv", b"userSecret77,B0,5,-4", r"Toys\.csv:2: bad timestamp"),
    (recbole, "toys.inter", b"userSecret77\tB0", r"toys\.inter:2: 2 fields, the header has 4"),
    (recbole, "toys.inter", b"userSecret77\tB0\t5\tnan", r"toys\.inter:2: bad timestamp"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "name", "text", "match"), FAULTS)
def test_faults_name_file_and_line_and_no_content(
    tmp_path: Path, write: Callable[[Path], None], name: str, text: bytes, match: str
) -> None:
    write(tmp_path)
    _replace(tmp_path / name, 2, text)
    with pytest.raises(DataError, match=match) as caught:
        load(tmp_path)
    assert name in str(caught.value) and SECRET not in str(caught.value) and caught.value.next_step
    issues = Issues(KINDS)
    read(tmp_path, issues, ReadOptions())
    assert sum(issues.counts.values()) == 1


def test_cut_gzip_names_the_line(tmp_path: Path) -> None:
    amazon2014(tmp_path)
    path = tmp_path / "reviews_Toys_5.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"reviews_Toys_5\.json\.gz:\d+: the gzip file is cut"):
        load(tmp_path)


def test_recbole_header_and_missing_columns(tmp_path: Path) -> None:
    recbole(tmp_path)
    _replace(tmp_path / "toys.inter", 1, b"user_id\titem_id\trating\ttimestamp")
    with pytest.raises(DataError, match=r"toys\.inter:1: column 1 of the header has no type"):
        load(tmp_path)
    _replace(tmp_path / "toys.inter", 1, b"user_id:token\titem_id:token\trating:float\tx:float")
    with pytest.raises(DataError, match="no column 'timestamp'"):
        load(tmp_path)


def test_columns_faults(tmp_path: Path) -> None:
    columns_csv(tmp_path)
    with pytest.raises(DataError, match="none of the columns user_id"):
        load(tmp_path)
    with pytest.raises(DataError, match="no column 'nope'"):
        load(tmp_path, user_column="nope", time_column="when")
    with pytest.raises(DataError, match="no column 'nope' for attribute 'title'"):
        load(tmp_path, user_column="who", time_column="when", attributes={"title": "nope"})
    _replace(tmp_path / "interactions.csv", 2, f"{SECRET},B0,17".encode())
    with pytest.raises(DataError, match="mixes numbers and dates"):
        load(tmp_path, user_column="who", time_column="when")


def test_detection_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        detect(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no known format") as caught:
        detect(tmp_path)
    assert "--format" in caught.value.next_step
    recbole(tmp_path)
    columns_csv(tmp_path)
    with pytest.raises(DataError, match="could be recbole or columns"):
        detect(tmp_path)
    with pytest.raises(DataError, match="no format 'xml'"):
        read(tmp_path, Issues(), ReadOptions(), "xml")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (float("nan"), ""), (True, ""), (7, "7"), (["a", None, " b "], "a, b"),
        ("a\n\tb\x00", "a b"),
        ("Melissa &amp; Doug", "Melissa & Doug"), ("var aPageStart = (new Date());", ""),
        ("5 < 6 mm", "5 < 6 mm"),
        ("<i>Oak</i>", "Oak"), ("x" * 400 + " " + "y" * 700, "x" * 400), ({"a": 1}, ""),
    ],
)  # fmt: skip
def test_clean_text(value: object, text: str) -> None:
    assert clean_text(value) == text


@pytest.mark.parametrize("value", ["", "soon", -1, float("inf"), float("nan"), True, None, 10**400])
def test_bad_times(value: object) -> None:
    assert parse_time(value) is None


def test_iso_times_are_utc() -> None:
    assert parse_time("1970-01-02") == 86400.0 == parse_time("1970-01-02T01:00:00+01:00")
