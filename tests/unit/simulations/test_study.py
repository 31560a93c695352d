"""Studies: which cells a table has, how ranks become figures, and a whole table on tiny domains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import MergeMethod, RunConfig
from common.errors import ConfigError
from simulations.config import DomainSource, SimulationConfig
from simulations.study import run
from simulations.study.lab import Lab, part_of
from simulations.study.score import markdown, score, slices
from simulations.study.tables import TABLES, Member, compared_with

NAMES = ("beds", "cups", "tea")
K = 10


@pytest.fixture
def config(pico_config: RunConfig, make_pico: Any, make_domain: Callable[..., Any], tmp_path: Path) -> Any:
    torch.set_num_threads(1)
    make_pico(tmp_path / "base")
    for number, name in enumerate(NAMES):
        make_domain(name=name, seed=number).save(tmp_path / name)
    return SimulationConfig.model_validate(
        {
            **pico_config.model_dump(mode="json"),
            "base": {"model": str(tmp_path / "base")},
            "publish": "ties",
            "merge": [{"method": "weight-averaging"}, {"method": "ties"}],
            "domain": [{"name": name, "path": str(tmp_path / name)} for name in NAMES],
        }
    )


def two_methods() -> SimulationConfig:
    merges = (MergeMethod(method="weight-averaging"), MergeMethod(method="ties"))
    domains = tuple(DomainSource(name=name, path=name) for name in NAMES)
    return SimulationConfig(publish="ties", merge=merges, domain=domains)


def test_an_unseen_domain_is_in_no_merge_that_is_tried_on_it() -> None:
    cells = [cell for cell in TABLES["unseen"](two_methods(), NAMES) if cell.method is not None]
    assert len(cells) == 6
    assert all({m.domain for m in cell.members} == set(NAMES) - {cell.domain} for cell in cells)


def test_only_the_scarce_domain_is_scarce() -> None:
    cells = [cell for cell in TABLES["scarce"](two_methods(), NAMES) if cell.row == "ties, 5% of users"]
    assert [cell.domain for cell in cells] == list(NAMES)
    assert cells[1].members == (Member("beds"), Member("cups", 0.05), Member("tea"))


def test_more_and_more_domains_are_merged_with_each() -> None:
    cells = [cell for cell in TABLES["count"](two_methods(), NAMES) if cell.row.startswith("ties")]
    assert {(cell.domain, *(m.domain for m in cell.members)) for cell in cells} == {
        ("beds", "beds", "cups"),
        ("cups", "cups", "tea"),
        ("tea", "beds", "tea"),
        *((name, *NAMES) for name in NAMES),
    }


def test_a_table_about_one_domain_and_one_merge(config: SimulationConfig, tmp_path: Path) -> None:
    path = run.run_study(
        "scarce", config, tmp_path / "study", [0], merges=["weight-averaging"], domains=["cups"]
    )
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["domains"] == ["cups"]
    assert {row.partition(",")[0] for row in record["rows"]} == {
        "zero-shot",
        "fine-tuned",
        "weight-averaging",
    }
    assert all(list(row["columns"]) == ["cups"] for row in record["rows"].values())
    made = {folder.name for folder in (tmp_path / "study" / "seed-0" / "merges").iterdir()}
    assert made == {f"beds+cups@{share}+tea" for share in (0.01, 0.05, 0.1)}


@pytest.mark.parametrize(("merges", "domains", "says"), [(["tie"], [], "ties"), ([], ["cup"], "cups")])
def test_a_table_of_what_is_not_there(
    merges: list[str], domains: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{says}'"):
        run.run_study("methods", two_methods(), tmp_path, [0], merges=merges, domains=domains)


def ranks(seed: int, users: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 30, users)


def ndcg(rank_U: np.ndarray) -> float:
    return float(np.mean([1 / np.log2(1 + rank) if rank <= K else 0 for rank in rank_U]))


def test_a_score_is_the_mean_over_domains_of_the_ratio_to_fine_tuned() -> None:
    seed = {"fine-tuned": {"a": ranks(0), "b": ranks(1)}, "ties": {"a": ranks(2), "b": ranks(3)}}
    row = score([seed], K, lambda _: "")["ties"]
    expected = [100 * ndcg(seed["ties"][d]) / ndcg(seed["fine-tuned"][d]) for d in ("a", "b")]
    assert row.ndcg == pytest.approx(np.mean(expected))
    assert list(row.columns.values()) == pytest.approx(expected)
    assert score([seed], K, lambda _: "")["fine-tuned"].ndcg == pytest.approx(100)
    assert row.above is None


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_holds_what_is_there() -> None:
    own, one = ranks(0), ranks(1)
    alike = one.copy()
    alike[:40] = np.maximum(1, alike[:40] - 3)  # the same but for forty users, who gain
    other = ranks(2)
    seed = {"fine-tuned": {"a": own}, "one": {"a": one}, "alike": {"a": alike}, "other": {"a": other}}
    table = score([seed], K, lambda _: "one")
    for name in ("alike", "other"):
        row = table[name]
        assert row.low is not None and row.high is not None and row.above is not None
        assert row.low <= row.above <= row.high
    widths = {name: (table[name].high or 0) - (table[name].low or 0) for name in ("alike", "other")}
    assert widths["alike"] < widths["other"] / 2
    assert (table["alike"].low or -1) > 0
    assert table["one"].above is None


def test_the_interval_covers_a_known_difference_nineteen_times_in_twenty() -> None:
    covered, trials = 0, 100
    for trial in range(trials):
        seed = {
            name: {"a": ranks(3 * trial + n, users=300)} for n, name in enumerate(("fine-tuned", "x", "y"))
        }
        row = score([seed], K, lambda _: "y")["x"]
        assert row.low is not None and row.high is not None
        covered += row.low <= 0 <= row.high  # both rows draw from the same ranks
    assert 88 <= covered <= 100


def test_a_domain_in_which_fine_tuning_finds_nothing_counts_nowhere() -> None:
    seed = {
        "fine-tuned": {"a": ranks(0), "b": np.full(9, 99)},
        "ties": {"a": ranks(1), "b": ranks(2, users=9)},
    }
    row = score([seed], K, lambda _: "fine-tuned")["ties"]
    assert list(row.columns) == ["a"]


def test_slices_part_the_users_of_every_domain() -> None:
    rows = {"fine-tuned": {"a": ranks(0, users=90), "b": ranks(1, users=60)}}
    length = {"a": np.arange(90), "b": np.arange(60)}
    (found,) = slices([rows], [length], [{"a": np.ones(90, int), "b": np.arange(60)}])
    cells = found["fine-tuned"]
    assert [len(cells[f"{name} history"]) for name in ("short", "middle", "long")] == [50, 50, 50]
    assert np.array_equal(cells["short history"][:30], rows["fine-tuned"]["a"][:30])
    assert sum(len(cells[f"{name} item"]) for name in ("rare", "middle", "popular")) == 150


def test_markdown_has_a_line_a_row() -> None:
    seed = {"zero-shot": {"a": ranks(1)}, "fine-tuned": {"a": ranks(0)}}
    lines = markdown(score([seed, seed], K, lambda row: compared_with("unseen", row)), K).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| fine-tuned | 100.0 |")


def test_a_share_of_users_keeps_the_catalog(make_domain: Callable[..., Any]) -> None:
    domain = make_domain()
    part = part_of(domain, 0.1, seed=1)
    assert (len(part.user_ids), part.item_ids) == (4, domain.item_ids)
    rows = [domain.user_ids.index(user) for user in part.user_ids]
    assert all(np.array_equal(part.train[i], domain.train[row]) for i, row in enumerate(rows))
    assert part_of(domain, 1.0, seed=1) is domain
    assert part_of(domain, 0.1, seed=2).user_ids != part.user_ids


def test_a_whole_table_twice(config: SimulationConfig, tmp_path: Path, monkeypatch: Any) -> None:
    path = run.run_study("methods", config, tmp_path / "study", [0, 1])
    record = json.loads(path.with_suffix(".json").read_text())
    assert list(record["rows"]) == ["zero-shot", "fine-tuned", "weight-averaging", "ties"]
    assert record["rows"]["fine-tuned"]["seeds"] == pytest.approx([100, 100])
    assert record["rows"]["ties"]["other"] == "weight-averaging"
    assert record["rows"]["ties"]["seconds"] > 0
    assert record["rows"]["fine-tuned"]["seconds"] is None

    def never(*_args: Any) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Lab, "_evaluate", never)
    again = run.run_study("methods", config, tmp_path / "study", [0, 1])
    assert json.loads(again.with_suffix(".json").read_text())["rows"] == record["rows"]
    sliced = run.run_study("slices", config, tmp_path / "study", [0]).read_text()
    assert "popular item" in sliced.splitlines()[0]
    assert ", weight-averaging" not in sliced


def test_weights_by_step_have_a_page(config: SimulationConfig, tmp_path: Path) -> None:
    learned = MergeMethod(method="mergerec", learning=config.learning.model_copy(update={"steps": 3}))
    path = run.run_study(
        "methods",
        config.model_copy(update={"merge": (learned,), "publish": "mergerec"}),
        tmp_path / "study",
        [0, 1],
    )
    (page,) = (path.parent / "weights").iterdir()
    assert page.name == "mergerec.html"
    assert all(f"{name}, seed {seed}" in page.read_text() for name in NAMES for seed in (0, 1))


def test_slices_of_some_users(config: SimulationConfig, tmp_path: Path) -> None:
    fewer = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"max_users": 25})})
    sliced = run.run_study("slices", fewer, tmp_path / "study", [0]).read_text()
    assert sliced.count("fine-tuned | 100.0 | 100.0") == 1
    lab = Lab(fewer, tmp_path / "study")
    assert len(lab.tested("tea")) == 25


def test_validation_users_have_a_table_of_their_own(config: SimulationConfig, tmp_path: Path) -> None:
    out = tmp_path / "study"
    tested = run.run_study("slices", config, out, [0])
    before = tested.read_text()
    chosen = run.run_study("slices", config, out, [0], split="valid")
    assert chosen.name == "slices-valid.md"
    assert chosen.read_text() != tested.read_text() == before
    assert json.loads(chosen.with_suffix(".json").read_text())["split"] == "valid"
    test, valid = Lab(config, out), Lab(config, out, split="valid")
    domain = valid.domain("tea")
    assert valid.sought("tea").tolist() == list(domain.valid)
    assert test.sought("tea").tolist() == list(domain.test)
    assert (test.history_lengths("tea") - valid.history_lengths("tea")).tolist() == [1] * len(domain.valid)


def test_another_source_of_a_domain_is_not_taken_for_the_first(
    config: SimulationConfig, tmp_path: Path
) -> None:
    def users(config: SimulationConfig) -> int:
        return len(Lab(config, tmp_path / "study").domain("tea").user_ids)

    fewer = tuple(source.model_copy(update={"users": 7}) for source in config.domain)
    assert users(config) == 40
    assert users(config.model_copy(update={"domain": fewer})) == 7
    assert users(config) == 40


def test_a_domain_with_few_users_has_a_table(config: SimulationConfig, tmp_path: Path) -> None:
    path = run.run_study("scarce", config, tmp_path / "study", [0])
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert rows["ties, 10% of users"]["other"] == "fine-tuned, 10% of users"


@pytest.mark.parametrize(
    ("table", "seeds", "says"), [("method", [0], "did you mean 'methods'"), ("unseen", [], "no seeds")]
)
def test_what_cannot_be_studied(table: str, seeds: list[int], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run.run_study(table, two_methods(), tmp_path, seeds)
