"""`run_merge`: dispatch, journal, options; and what `publishing` writes from its result."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from common.catalog import Catalog
from common.config import LearningSection, MergeMethod, RunConfig
from common.errors import ConfigError, VectorError
from common.models.base import load_tensors, model_digest
from common.models.encoder import Encoder
from common.progress import NO_REPORT
from common.vectors import TaskVector
from server.learning.options import parse_candidates
from server.merge import MergeResult, check_method, known_methods, run_merge
from server.publishing import Provenance, publish
from server.tensors import merge_tensors

LAYER = MergeMethod(method="mergerec", options={"granularity": "layer"})


def config(**learning: Any) -> RunConfig:
    section = {"steps": 4, "batch_size": 4, "precision": "fp32", **learning}
    return RunConfig(learning=LearningSection.model_validate(section))


class Case:
    """The pico federation; `merge` runs one method in a work folder."""

    def __init__(
        self, base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], work: Path
    ) -> None:
        self.base, self.taus, self.catalogs, self.work = base, taus, catalogs, work

    def merge(self, method: MergeMethod, settings: RunConfig | None = None, **changes: Any) -> MergeResult:
        taus, catalogs = changes.get("taus", self.taus), changes.get("catalogs", self.catalogs)
        report, work = changes.get("report", NO_REPORT), changes.get("work", self.work)
        return run_merge(method, self.base, taus, catalogs, settings or config(), work, report)


@pytest.fixture
def case(base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path) -> Case:
    return Case(base, taus, catalogs, tmp_path / "work")


def test_training_free_needs_no_catalog_and_is_done_once(case: Case) -> None:
    method = MergeMethod(method="ties", options={"density": 0.5})
    first = case.merge(method, catalogs={})
    expected = merge_tensors("ties", {name: case.taus[name] for name in sorted(case.taus)}, {"density": 0.5})
    assert all(torch.equal(first.vector[name], expected[name]) for name in expected)
    assert first.options == {"density": 0.5, "lambda": 1.0}
    assert not first.resumed
    again = case.merge(method, catalogs={})
    assert again.resumed
    assert again.seconds == first.seconds
    assert all(torch.equal(again.vector[name], expected[name]) for name in expected)


def test_other_inputs_or_a_damaged_file_merge_again(case: Case) -> None:
    method = MergeMethod(method="task-arithmetic", name="sum")
    case.merge(method)
    assert not case.merge(MergeMethod(method="task-arithmetic", name="sum", options={"lambda": 0.5})).resumed
    fewer = {name: case.taus[name] for name in ("garden", "toys")}
    assert not case.merge(method, taus=fewer).resumed
    assert not case.merge(method).resumed
    path = case.work / "sum" / "vector.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert not case.merge(method).resumed
    (case.work / "sum" / "merge.json").write_text("{")
    assert not case.merge(method).resumed
    assert case.merge(method).resumed


def test_learned_is_journaled_and_follows_its_inputs(case: Case) -> None:
    first = case.merge(LAYER)
    assert first.label == "mergerec-layer"
    assert list(first.coefficients) == ["layer-0", "layer-1", "rest"]
    assert first.trajectory_path is not None
    assert first.trajectory_path.exists()
    again = case.merge(LAYER)
    assert again.resumed
    assert again.coefficients == first.coefficients
    assert all(torch.equal(again.vector[name], first.vector[name]) for name in first.vector)
    assert not case.merge(LAYER, config(mask_seen=False)).resumed
    record = json.loads((case.work / "mergerec-layer" / "merge.json").read_text())
    assert set(record["inputs"]) >= {
        "base_model",
        "vectors",
        "catalogs",
        "learning",
        "text",
        "seed",
        "digest",
    }
    own = LAYER.model_copy(update={"learning": LearningSection(steps=2, precision="fp32"), "name": "short"})
    assert len(case.merge(own).coefficients) == 3
    lines = (case.work / "short" / "trajectory.jsonl").read_text().splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize("method", ["mergerec", "auto", "regmean"])
def test_what_a_catalog_calls_its_domain_does_not_matter(case: Case, method: str) -> None:
    """`isthmus merge` calls models what their folders are called, and two may have one catalog."""
    shared = dict.fromkeys(case.taus, case.catalogs["kitchen"])
    options = {"candidates": "weight-averaging, ties"} if method == "auto" else {}
    merged = case.merge(MergeMethod(method=method, options=options), catalogs=shared)
    if method == "mergerec":
        assert set(merged.coefficients["layer-0"]) == set(case.taus)
    if method == "auto":
        assert set(merged.facts["scores"]["ties"]["domains"]) == set(case.taus)


def test_learned_on_ties_vectors(case: Case) -> None:
    options: dict[str, float | int | str | bool] = {
        "granularity": "domain",
        "process": "ties",
        "density": 0.3,
    }
    result = case.merge(MergeMethod(method="adamerging", name="ada-ties", options=options))
    assert result.options == {**options, "lambda": 1.0}
    assert all(abs(value - 1.0) < 0.1 for value in result.coefficients["all"].values())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MergeMethod(method="tis"), "unknown merge method 'tis'\n  next: did you mean 'ties'"),
        (MergeMethod(method="mergrec"), "did you mean 'mergerec'"),
        (MergeMethod(method="mergerec", options={"granularty": "layer"}), "did you mean 'granularity'"),
        (MergeMethod(method="mergerec", options={"granularity": "row"}), "granularity: Input should be"),
        (
            MergeMethod(method="mergerec", options={"process": "tie"}),
            "process: Input should be 'none', ",
        ),
        (MergeMethod(method="mergerec", options={"density": 0.2}), "unknown key 'density'"),
        (MergeMethod(method="mergerec", options={"process": "ties", "density": 2.0}), "density"),
        (MergeMethod(method="ties", learning=LearningSection()), "ties learns nothing"),
        (MergeMethod(method="auto", options={"candidates": "ties, tis"}), "unknown merge method 'tis'"),
        (MergeMethod(method="auto", options={"candidates": "ties,"}), "no candidate can be ''"),
        (
            MergeMethod(method="auto", options={"candidates": "ties, ties"}),
            "'ties', or it stands there twice",
        ),
        (MergeMethod(method="auto", options={"candidates": "auto"}), "no candidate can be 'auto'"),
        (MergeMethod(method="auto", options={"candidates": "ties density"}), "'density' is no option"),
        (MergeMethod(method="auto", options={"candidates": "ties density=2.0"}), "less than or equal to 1"),
        (MergeMethod(method="auto", options={"margn": 0.1}), "did you mean 'margin'"),
    ],
)
def test_bad_methods_are_refused_before_anything_runs(method: MergeMethod, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check_method(method)


def test_candidates_of_auto_are_resolved_before_anything_runs() -> None:
    text = str(check_method(MergeMethod(method="auto"))["candidates"])
    assert {"weight-averaging", "ties", "task-arithmetic lambda=0.3"} <= set(text.split(", "))
    assert {"iso-c", "confluence"} <= set(text.split(", "))
    named = parse_candidates("task-arithmetic lambda=0.2,  ties density=1")
    assert named["task-arithmetic lambda=0.2"].options == {"lambda": 0.2}
    assert named["ties density=1"].label == "01-ties-density-1"


def test_auto_merges_by_the_best_candidate_and_says_why(case: Case) -> None:
    """Task arithmetic at 1 on one domain is its teacher itself, which must win; at -1 it is its opposite."""
    taus = {"garden": case.taus["garden"]}
    text = "task-arithmetic lambda=-1.0, task-arithmetic lambda=1.0, adamerging granularity=domain"
    method = MergeMethod(method="auto", options={"candidates": text})
    result = case.merge(method, taus=taus)
    assert result.facts["chosen"] == "task-arithmetic lambda=1.0"
    assert all(torch.equal(result.vector[name], taus["garden"][name]) for name in result.vector)
    record = json.loads((case.work / "auto" / "merge.json").read_text())
    assert record["facts"] == result.facts
    scores = record["facts"]["scores"]
    assert list(scores) == text.split(", ")
    assert scores["task-arithmetic lambda=1.0"]["domains"]["garden"] == pytest.approx(1.0)
    assert scores["task-arithmetic lambda=-1.0"]["average"] < 0.99
    assert "average" in record["facts"]["why"]
    again = case.merge(method, taus=taus)
    assert again.resumed
    assert again.facts == result.facts
    with pytest.raises(ConfigError, match="no held-back pseudo-users"):
        case.merge(method, config(holdout=0.0), taus=taus)


def test_auto_keeps_the_trajectory_of_what_it_chose(case: Case) -> None:
    options = {"candidates": "adamerging granularity=domain"}
    merged = case.merge(MergeMethod(method="auto", options=options))
    assert merged.trajectory_path is not None
    assert json.loads(merged.trajectory_path.read_text().splitlines()[-1])["step"] == 4


def test_auto_that_was_killed_goes_on_after_the_candidates_it_has(case: Case, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    heard: list[str] = []

    def kill(*, phase: str, step: int = 0, **rest: Any) -> None:
        heard.append(phase)
        if (phase, step) == ("auto: merge 02-adamerging", 3):
            raise Killed

    method = MergeMethod(method="auto", options={"candidates": "weight-averaging, ties, adamerging"})
    with pytest.raises(Killed):
        case.merge(method, report=kill)
    assert {"auto: judge", "auto: merge 00-weight-averaging", "auto: merge 01-ties"} <= set(heard)
    first = heard.copy()
    heard.clear()
    kept = (case.work / "auto" / "candidates" / "01-ties" / "merge.json").stat().st_mtime_ns

    def listen(*, phase: str, **rest: Any) -> None:
        heard.append(phase)

    result = case.merge(method, report=listen)
    assert "auto: merge 01-ties" in first
    assert "auto: merge 01-ties" not in heard
    assert (case.work / "auto" / "candidates" / "01-ties" / "merge.json").stat().st_mtime_ns == kept
    whole = case.merge(method, work=tmp_path / "whole")
    assert result.facts == whole.facts
    assert all(torch.equal(result.vector[name], whole.vector[name]) for name in whole.vector)


def test_how_learning_went_is_journaled(case: Case) -> None:
    result = case.merge(LAYER)
    assert result.facts["steps"] == 4
    assert set(result.facts["held_back_loss"]) == {"initial", "best"}
    assert result.facts["fallback"] == (result.facts["best_step"] == 0)
    assert case.merge(LAYER).facts == result.facts


def test_defaults_of_the_run_configuration_are_all_known() -> None:
    for method in RunConfig().merge:
        assert check_method(method) is not None
        assert method.method in known_methods()


def test_vectors_that_do_not_fit_name_the_domain(case: Case) -> None:
    odd = dict(list(case.taus["kitchen"].items())[1:])
    with pytest.raises(VectorError, match="task vector kitchen has no tensor"):
        case.merge(LAYER, taus={**case.taus, "kitchen": odd})


def provenance(settings: RunConfig | None = None) -> Provenance:
    digests = {"garden": "a" * 64, "kitchen": "b" * 64, "toys": "c" * 64}
    return Provenance("demo", settings or config(), digests, frozenset({"toys"}), "0.1.0")


def test_published_folder_loads_without_us(case: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    result, out = case.merge(LAYER), tmp_path / "model"
    publish(case.base, result, provenance(), out)
    text = "title: red oak spoon 1, brand: acme"
    encoder = Encoder.load(out)
    ours_E = encoder.encode(
        [encoder.tokenize_items([["title: red oak spoon 1", "brand: acme"]], 32).item(0)]
    )[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_E = SentenceTransformer(str(out), device="cpu").encode([text], convert_to_tensor=True)[0]
        model = AutoModel.from_pretrained(out)
    torch.testing.assert_close(theirs_E, ours_E, rtol=1e-4, atol=1e-5)
    name = "encoder.layer.0.output.dense.weight"
    expected = load_tensors(case.base)[name] + result.vector[name]
    assert torch.equal(dict(model.named_parameters())[name], expected)
    table = "embeddings.word_embeddings.weight"
    assert torch.equal(load_tensors(out)[table], load_tensors(case.base)[table])


def test_card_says_where_the_model_comes_from(case: Case, tmp_path: Path) -> None:
    result, out = case.merge(LAYER), tmp_path / "model"
    record = publish(case.base, result, provenance(), out)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert {"model-merging", "synthetic-data", "mergerec"} <= set(card.data.tags or [])
    for text in ("garden", "b" * 64, model_digest(case.base), "layer-1", "granularity = layer", "leak"):
        assert text in card.text
    assert "**Synthetic data:** toys" in card.text
    assert '"max_seq_len": 64' in card.text
    for private in [*case.catalogs["toys"].item_ids, case.catalogs["toys"].attributes["title"][0]]:
        assert private not in card.content
    assert json.loads((out / "merge.json").read_text()) == record
    assert record["model_digest"] == model_digest(out)
    assert record["domains"]["toys"] == {"vector_sha256": "c" * 64, "synthetic": True}


def test_card_of_a_local_base_does_not_tell_its_path(case: Case, tmp_path: Path) -> None:
    settings = RunConfig.model_validate({"base": {"model": str(case.base)}})
    publish(case.base, case.merge(MergeMethod(method="ties")), provenance(settings), tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.base_model is None
    assert str(case.base) not in (tmp_path / "model" / "README.md").read_text()
    assert str(case.base) not in (tmp_path / "model" / "merge.json").read_text()


def test_publishing_replaces_whole_folders(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "model"
    for method in ("ties", "weight-averaging"):
        publish(case.base, case.merge(MergeMethod(method=method)), provenance(), out)
        assert json.loads((out / "merge.json").read_text())["label"] == method
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    bad = case.merge(MergeMethod(method="ties"))
    bad.vector["encoder.layer.0.output.dense.weight"] = torch.ones(3)
    with pytest.raises(VectorError, match=r"encoder\.layer\.0\.output\.dense\.weight"):
        publish(case.base, bad, provenance(), out)
    assert json.loads((out / "merge.json").read_text())["label"] == "weight-averaging"
