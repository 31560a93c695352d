"""The report: parsed as HTML, everything of the summary in it, nothing loaded or let through."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from markup import Page
from summaries import DOMAINS, LABELS, LOST, MARKED, make_events, make_summary

from common.errors import DataError
from common.pages import DASH, tag
from server.report import SYNTHETIC, write_report
from server.reporting.charts import chart, smooth
from server.reporting.data import groups, row_order
from server.results import save, tables


def page(folder: Path, summary: dict[str, Any], events: list[dict[str, Any]] | None = None) -> Page:
    """Through `server.results.save`, as the server writes it (keys sorted)."""
    save(folder, summary, make_events() if events is None else events)
    assert write_report(folder) == folder / "report.html"
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_report_shows_every_row_domain_and_digest(tmp_path: Path) -> None:
    summary = make_summary()
    found = page(tmp_path, summary)
    for row in summary["results"]:
        assert len(found.labelled(row)) >= 2, row  # NDCG and recall
    for word in (
        *DOMAINS,
        LOST,
        SYNTHETIC,
        "three-shops",
        "cdcdcdcdcdcd",
        "owner-2",
        "not anonymous",
        "quorum = 3",
    ):
        assert word in found.text, word
    assert "not private, simulation only" in found.text
    assert found.labelled("mergerec-layer")[0] == [
        "mergerec-layer", DASH, "0.098794.9", "0.049394.9", "0.032994.9", "0.060394.9"
    ]  # fmt: skip
    assert found.bold[:4] == ["0.0987", "0.0493", "0.0329", "0.0603"]
    assert "The universal model reaches 94.8 of 100 on NDCG@10" in found.text
    assert found.labelled("layer 11") and len(found.labelled("all layers")) == 1
    assert found.labelled("kitchen")[0][1:3] == ["812.3 kB1 parcel", "21.4 MB1 parcel"]
    assert found.labelled("all")[-1][-1] == "63.9 MB3 parcels"
    assert found.labelled("server")[0] == ["server", "1.9 GB", "512.3"]
    assert sum(name == "polyline" for name, _ in found.tags) == 2 * (len(DOMAINS) + 1)


def test_the_owners_word_on_what_was_published(tmp_path: Path) -> None:
    summary = make_summary()
    label = summary["published"]["label"]
    summary["published"]["owners_say"] |= {"best": "ties", "behind": 1.25, "below_own": ["toys"]}
    text = page(tmp_path, summary).text
    assert "ties is the best of 4 merges over" in text
    assert f"{label}, which was published, is 1.2 points behind. It is below the own model of toys" in text


def test_vectors_that_stand_out_and_merges_without_them(tmp_path: Path) -> None:
    summary = make_summary()
    summary["domains"]["toys"]["withdrawn"] = "three-shops-withdrawal-9"
    found = page(tmp_path, summary)
    assert found.labelled("toys")[-2:] == [
        ["toys", "1.500", "4.2", "0.310", DASH, MARKED, "0.125", "0.125", "1.000"],
        ["toys", "+0.0312same best 10: 0.871", f"-0.0020same best 10: {DASH}", f"{DASH}same best 10: {DASH}"],
    ]
    assert "a mark is a reason to look" in found.text and "told from the public catalogs" in found.text
    assert "vector withdrawn: run three-shops-withdrawal-9" in found.text
    del summary["vectors"], summary["leave_one_out"]
    assert "stands out" not in page(tmp_path, summary).text


def test_report_loads_nothing(tmp_path: Path) -> None:
    assert page(tmp_path, make_summary()).loads_nothing()


def hostile(tree: Any) -> Any:
    """Every text of the tree, keys of free choice too, with markup in it."""
    text = "<script>alert('x')</script>\"&"
    if isinstance(tree, dict):
        own = {*DOMAINS, LOST, *LABELS, "server", "candidate", "all", "rest", "contribute", "steps", "quorum"}
        return {key + text if key in own else key: hostile(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hostile(value) for value in tree]
    return tree + text if isinstance(tree, str) and tree != "coefficients" else tree


def test_everything_is_escaped(tmp_path: Path) -> None:
    found = page(tmp_path, hostile(make_summary()), hostile(make_events()))
    assert "script" not in {name for name, _ in found.tags}
    assert "<script" not in found.source
    assert found.text.count("<script>alert('x')</script>\"&") > 50
    assert tag("td", "<b>", title='"') == '<td title="&quot;">&lt;b&gt;</td>'


def test_a_lost_domain_and_one_that_returns_little(tmp_path: Path) -> None:
    summary = make_summary()
    results = copy.deepcopy(summary["results"])
    del results["universal"]["toys"]
    del results["fine-tuned"]["music"]["recall@10"]
    found = page(tmp_path, {**summary, **tables(results)})
    assert found.labelled(LOST)[-1][:3] == [LOST, "owner-9", "lost: deadline"]
    assert found.labelled("universal")[0][4] == DASH
    assert found.labelled("universal")[0][5].endswith("over 2 only")
    assert found.labelled("zero-shot")[1][3].endswith(DASH)  # no normalised recall without fine-tuned


def test_without_results_events_or_anything(tmp_path: Path) -> None:
    summary = {
        **make_summary(),
        **tables({}),
        "merges": {},
        "crossings": {},
        "processes": {},
        "synthetic": False,
    }
    found = page(tmp_path, summary, [])
    assert "No figures" in found.text and "No headline" in found.text and "No merge of this run" in found.text
    assert SYNTHETIC not in found.text
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "summary.json").write_text('{"schema": 1}')
    bare = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No domain took part" in bare.text


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    whole = page(tmp_path, make_summary())
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('[]\n{"type": "coefficients", "merge": "mergerec-la')
    assert write_report(tmp_path).read_text(encoding="utf-8") == whole.source


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}'])
def test_what_is_no_summary_is_refused(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_rows_are_in_the_order_of_the_configuration() -> None:
    summary = json.loads(json.dumps(make_summary(), sort_keys=True))
    assert row_order(summary) == ["zero-shot", "fine-tuned", *LABELS, "universal", "joint"]
    assert groups({"a": 0.1}) == {"all": {"a": 0.1}}
    assert groups({}) == {}


@pytest.mark.parametrize("low,high", [(0.2, 0.2), (0.0, 0.0), (-3e-5, 4e-5), (0, 9000), (-1.5, -0.5)])
def test_chart_lines_stay_inside(low: float, high: float) -> None:
    picture = chart("x", {"a": [(0, low), (1, high)], "b": [(0, high)]}, ["a", "b"])
    for name, attrs in Page(picture).tags:
        if name == "polyline":
            for point in (attrs["points"] or "").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 420 and 0 <= y <= 180
    assert chart("x", {"a": [(0, 1.0)]}, ["a"]) == ""
    assert len(smooth([(float(n), 1.0) for n in range(1001)])) <= 120
