"""prepare and check: what is kept, what is refused, and that an error changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from clients.data import domain as domain_module
from clients.data.assemble import Settings
from clients.data.check import check
from clients.data.cli import app
from clients.data.domain import Domain
from clients.data.prepare import prepare
from common.errors import DataError, StorageError

REAL = Path(__file__).parents[4] / "shared" / "data" / "domains"
SECRET = "userSecret77"
Row = tuple[str, str, int]


def grid(users: int = 6, items: int = 6) -> list[Row]:
    """Everybody bought everything, at shuffled times: a 5-core."""
    rng = np.random.default_rng(0)
    rows = [(f"{SECRET}-{u}", f"i{i}", int(rng.integers(10**6))) for u in range(users) for i in range(items)]
    return [rows[n] for n in rng.permutation(len(rows))]


def source(
    folder: Path, rows: list[Row], titles: dict[str, str] | None = None, secret_brand: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    titles = {f"i{n}": f"item {n}" for n in range(6)} if titles is None else titles
    text = "".join(json.dumps({"user": u, "item": i, "time": t}) + "\n" for u, i, t in rows)
    (folder / "interactions.jsonl").write_text(text)
    items = [{"item": i, "title": t, "cost": secret_brand or "dear"} for i, t in titles.items()]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare_splits_by_time_and_keeps_private_attributes_home(tmp_path: Path) -> None:
    rows = [*grid(), (f"{SECRET}-x", "i0", 1)]
    made = prepare(source(tmp_path / "in", rows), tmp_path / "out", "toys")
    domain = Domain.load(tmp_path / "out")
    assert domain.counts() == {"users": 6, "items": 6, "interactions": 36}
    for user, history, valid, test in zip(
        domain.user_ids, domain.train, domain.valid, domain.test, strict=True
    ):
        expected = [i for _, i in sorted((t, i) for u, i, t in rows if u == user)]
        assert [domain.item_ids[n] for n in (*history, valid, test)] == expected
        assert history.dtype == np.int32 and history.flags.writeable
    assert domain.item_ids == sorted(domain.item_ids)
    assert set(domain.attributes) == {"title", "cost"} and set(domain.catalog().attributes) == {"title"}
    assert [stage.name.split(",")[0] for stage in made.stages] == ["as read", "5-core"]
    record = json.loads((tmp_path / "out" / "domain.json").read_text())
    assert len(record["provenance"]["sources"]) == 2 and record["provenance"]["settings"]["k_core"] == 5
    assert not record["synthetic"]


def test_prepare_is_deterministic(tmp_path: Path) -> None:
    path = source(tmp_path / "in", grid())
    for out in ("a", "b"):
        prepare(path, tmp_path / out, "toys", users=3, seed=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def _corrupt(folder: Path) -> None:
    path = folder / "interactions.jsonl"
    raw = path.read_text().splitlines()
    raw[6] = raw[6][:-3]
    path.write_text("\n".join(raw))


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"corrupt": True}, "corrupt-lines", r"interactions\.jsonl:7:\d+: not valid JSON"),
    ({"titles": {**{f"i{n}": "t" for n in range(6)}, "i3": ""}}, "items-without-text",
     r"items\.jsonl:4: an item without text"),
    ({"titles": {f"i{n}": "t" for n in range(5)}}, "unknown-items",
     r"interactions\.jsonl:\d+: an interaction with an item that items\.jsonl does not have"),
    ({"bad_time": True}, "bad-times", r"interactions\.jsonl:37: bad timestamp"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "match"), CASES, ids=[case[1] for case in CASES])
def test_bad_input_is_named_and_changes_nothing(
    tmp_path: Path, change: dict[str, Any], kind: str, match: str
) -> None:
    prepare(source(tmp_path / "good", grid()), tmp_path / "out", "toys")
    before = tree(tmp_path)
    path = source(tmp_path / "bad", grid(), change.get("titles"))
    if "corrupt" in change:
        _corrupt(path)
    if "bad_time" in change:
        with (path / "interactions.jsonl").open("a") as file:
            file.write(json.dumps({"user": SECRET, "item": "i0", "time": "noon"}) + "\n")
    with pytest.raises(DataError, match=match) as caught:
        prepare(path, tmp_path / "out", "toys", replace_existing=True)
    assert SECRET not in str(caught.value) and f"--drop {kind}" in caught.value.next_step
    assert tree(tmp_path / "out") == {
        name[4:]: data for name, data in before.items() if name.startswith("out/")
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    report = check(path)
    assert not report.ready and [p.kind for p in report.problems] == [kind]
    assert check(path, Settings(k_core=3), drop=[kind]).ready
    made = prepare(path, tmp_path / "dropped", "toys", Settings(k_core=3), drop=[kind])
    assert list(made.dropped) == [kind] and made.domain.provenance["dropped"] == made.dropped


def test_full_disk_leaves_the_old_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "in", grid())
    prepare(path, tmp_path / "out", "toys")
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(domain_module.pq, "write_table", full)
    with pytest.raises(StorageError, match="the disk is full"):
        prepare(path, tmp_path / "out", "toys", replace_existing=True)
    assert tree(tmp_path) == before


def test_out_is_never_overwritten_by_surprise(tmp_path: Path) -> None:
    path = source(tmp_path / "in", grid())
    prepare(path, tmp_path / "out", "toys")
    with pytest.raises(DataError, match="exists already"):
        prepare(path, tmp_path / "out", "toys")
    prepare(path, tmp_path / "out", "toys", users=2, replace_existing=True)
    assert len(Domain.load(tmp_path / "out").user_ids) == 2
    with pytest.raises(DataError, match="not a domain folder"):
        prepare(path, tmp_path / "in", "toys", replace_existing=True)


def test_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = source(tmp_path / "in", grid())
    for settings, match in (
        (Settings(public=("nope",)), "no attribute 'nope'"),
        (Settings(k_core=7), "nothing is left after filtering"),
    ):
        with pytest.raises(DataError, match=match):
            prepare(path, tmp_path / "out", "toys", settings)
    with pytest.raises(DataError, match="no such kind"):
        prepare(path, tmp_path / "out", "toys", drop=["everything"])
    with pytest.raises(DataError, match="domain's name"):
        prepare(path, tmp_path / "out", "Toys R")
    assert not (tmp_path / "out").exists()


def test_numeric_ids_are_published_as_opaque_ones(tmp_path: Path) -> None:
    rows = [(u, i[1:], t) for u, i, t in grid()]
    titles = {str(n): f"title {9 - n}" for n in range(6)}
    prepare(source(tmp_path / "in", rows, titles), tmp_path / "auto", "toys")
    domain = Domain.load(tmp_path / "auto")
    assert domain.item_ids[0] == "item-1" and domain.attributes["title"][0] == "title 4"
    assert (tmp_path / "auto" / "item_ids.parquet").is_file()
    prepare(tmp_path / "in", tmp_path / "keep", "toys", Settings(item_ids="keep"))
    assert Domain.load(tmp_path / "keep").item_ids == [str(n) for n in range(6)]


def _domain() -> Domain:
    train = [np.array([0, 1], np.int32), np.array([2], np.int32), np.array([3, 4], np.int32)]
    valid, test = np.array([2, 3, 5], np.int32), np.array([3, 3, 5], np.int32)
    return Domain(
        "d", list("abcdef"), {"title": list("ABCDEF")}, ["x", "y", "z"], train, valid, test, ("title",)
    )


def test_subsample_keeps_and_reindexes_only_what_is_touched() -> None:
    domain = _domain()
    part = domain.subsample(2, seed=0)
    assert part == part and len(part.user_ids) == 2
    for row, user in enumerate(part.user_ids):
        at = domain.user_ids.index(user)
        assert [part.item_ids[i] for i in part.train[row]] == [domain.item_ids[i] for i in domain.train[at]]
        assert part.item_ids[part.test[row]] == domain.item_ids[domain.test[at]]
    flat = np.concatenate([*part.train, part.valid, part.test])
    assert set(flat.tolist()) == set(range(len(part.item_ids)))
    assert [t.lower() for t in part.attributes["title"]] == part.item_ids
    assert domain.subsample(2, 0).user_ids == part.user_ids and domain.subsample(3, 0) is domain
    with pytest.raises(DataError, match="at least one user"):
        domain.subsample(0, 0)


def test_load_refuses_damage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"domain\.json is missing"):
        Domain.load(tmp_path)
    _domain().save(tmp_path / "d")
    (tmp_path / "d" / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"items\.parquet: not readable"):
        Domain.load(tmp_path / "d")
    (tmp_path / "d" / "domain.json").write_text('{"schema": 9}')
    with pytest.raises(DataError, match=r"domain\.json: not JSON of schema 1"):
        Domain.load(tmp_path / "d")


def test_check_reports(tmp_path: Path) -> None:
    rows = grid()
    report = check(source(tmp_path / "in", [*rows, rows[0]]))
    assert (report.users, report.items, report.interactions) == (6, 6, 37)
    assert report.duplicates_exact == 1 and report.repeated_pairs == 1
    assert report.sparsity == 1 - 37 / 36 and report.text_coverage == {"title": 1.0, "cost": 1.0}
    assert report.stages[-1].interactions == 36 and report.ready
    assert SECRET not in json.dumps(report.to_json())


def test_cli(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = str(source(tmp_path / "in", grid()))
    result = run(app, ["check", path, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["users"] == 6
    assert "ready" in run(app, ["check", path]).stdout
    out = str(tmp_path / "out")
    args = ["prepare", path, "--out", out, "--name", "toys", "--public", "title,cost", "--k-core", "5"]
    result = run(app, args)
    assert result.exit_code == 0 and "6 users" in result.stdout
    result = run(app, args)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "next: " in result.stderr
    _corrupt(Path(path))
    result = run(app, ["check", path])
    assert result.exit_code == 1 and "corrupt-lines" in result.stdout and "not ready" in result.stdout
    assert run(app, ["check", path, "--drop", "all", "--k-core", "3"]).exit_code == 0


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "evaluable"),
    [("scientific", 8317, 4344, 58492, 8317), ("pantry", 14180, 4968, 137769, 14178)],
)
def test_real_domains_have_their_published_counts(
    tmp_path: Path, name: str, users: int, items: int, interactions: int, evaluable: int
) -> None:
    path = REAL / f"{name}.tar.gz"
    if not path.is_file():
        pytest.skip(f"no {name}.tar.gz in ../shared/data/domains")
    report = check(path)
    assert (report.users, report.items, report.interactions) == (users, items, interactions)
    assert report.ready
    prepare(path, tmp_path / "out", name)
    assert Domain.load(tmp_path / "out").counts() | {"interactions": 0} == {
        "users": evaluable,
        "items": items,
        "interactions": 0,
    }
