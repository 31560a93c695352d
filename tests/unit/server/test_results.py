"""Tables of results from admitted metrics."""

import json
from pathlib import Path

import pytest

from server.results import owners_say, save, tables

RESULTS = {
    "fine-tuned": {"toys": {"ndcg@10": 0.2, "recall@10": 0.0}, "books": {"ndcg@10": 0.4}},
    "universal": {"toys": {"ndcg@10": 0.1, "recall@10": 0.3}, "books": {"ndcg@10": 0.6}},
    "joint": {"other": {"ndcg@10": 0.5}},
}


def test_fine_tuned_is_a_hundred() -> None:
    found = tables(RESULTS)
    assert found["results"] == RESULTS
    assert found["normalised"]["fine-tuned"] == {"toys": {"ndcg@10": 100.0}, "books": {"ndcg@10": 100.0}}
    assert found["normalised"]["universal"]["toys"] == {"ndcg@10": 50.0}  # nothing is divided by 0
    assert "joint" not in found["normalised"]  # no fine-tuned model of that domain
    assert found["average"]["universal"]["normalised"]["ndcg@10"] == pytest.approx(100.0)
    assert found["average"]["universal"]["results"]["ndcg@10"] == pytest.approx(0.35)
    assert found["average"]["joint"]["normalised"] == {}


def test_no_metrics_no_rows() -> None:
    assert tables({}) == {"results": {}, "normalised": {}, "average": {}}


def test_owners_confirm_what_was_published_or_do_not() -> None:
    results = {
        "fine-tuned": {name: {"ndcg@10": 0.2} for name in ("toys", "books", "tea")},
        "ties": {"toys": {"ndcg@10": 0.22}, "books": {"ndcg@10": 0.18}},
        "auto": {"toys": {"ndcg@10": 0.21}, "books": {"ndcg@10": 0.21}, "tea": {"ndcg@10": 0.1}},
    }
    said = owners_say(results, ["ties", "auto"], "auto")
    assert said is not None
    assert said["average"] == pytest.approx({"ties": 100.0, "auto": 105.0})
    assert (said["best"], said["behind"], said["domains"], said["below_own"]) == ("auto", 0.0, 2, [])
    said = owners_say(results, ["ties", "auto"], "ties")
    assert said is not None
    assert said["behind"] == pytest.approx(5.0)
    assert said["below_own"] == ["books"]
    assert owners_say({}, ["ties"], "ties") is None
    assert owners_say({"ties": results["ties"]}, ["ties"], "ties") is None  # nobody has a model to compare


def test_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Path] = []
    monkeypatch.setattr("server.results.write_report", reported.append)
    save(tmp_path, {"schema": 1, **tables(RESULTS)}, [{"type": "phase", "phase": "merge", "time_s": 1.0}])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["type"] == "phase"
    assert {"type": "result", "row": "joint", "domain": "other", "metrics": {"ndcg@10": 0.5}} in lines
    assert len(lines) == 6
    assert json.loads((tmp_path / "summary.json").read_text())["schema"] == 1
    assert reported == [tmp_path]
