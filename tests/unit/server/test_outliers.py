"""Norms and cosines of vectors, against numpy; what stands out, and what must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import VectorError
from common.tensorfile import BLOCK_VALUES
from common.vectors import write_vector
from server.outliers import MIN_DOMAINS, scores, survey

SHAPES = {
    "encoder.layer.0.weight": (40, 30),
    "encoder.layer.1.weight": (BLOCK_VALUES // 64 + 3, 65),
    "pooler.weight": (20, 10),
}


def vectors(folder: Path, count: int, codec: str = "fp32", **changed: float) -> dict[str, Path]:
    """`count` vectors with a common part; `changed` gives factors by name."""
    common = {name: torch.randn(shape, generator=seeded(99)) for name, shape in SHAPES.items()}
    files = {}
    for number in range(count):
        name = f"d{number}"
        own = {n: torch.randn(shape, generator=seeded(number)) for n, shape in SHAPES.items()}
        tau = {n: changed.get(name, 1.0) * (common[n] + own[n]) for n in SHAPES}
        files[name] = folder / f"{name}.safetensors"
        write_vector(files[name], tau, codec)  # type: ignore[arg-type]
    return files


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("codecs", [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")])
def test_figures_are_those_of_the_whole_vectors(tmp_path: Path, codecs: tuple[str, str]) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    files = {**vectors(first, 3, codecs[0]), "d2": vectors(last, 3, codecs[1])["d2"]}
    found = survey(files)
    from safetensors.torch import load_file

    flat = {
        name: {n: t.double().numpy().ravel() for n, t in load_file(path).items()}
        for name, path in files.items()
    }
    whole = {name: np.concatenate([part[n] for n in SHAPES]) for name, part in flat.items()}
    unit = {name: v / np.linalg.norm(v) for name, v in whole.items()}
    for name in files:
        facts = found["vectors"][name]
        assert facts["norm"] == pytest.approx(np.linalg.norm(whole[name]), rel=1e-5)
        assert set(facts["norms"]) == {"layer-0", "layer-1", "rest"}
        layer = flat[name]["encoder.layer.1.weight"]
        assert facts["norms"]["layer-1"] == pytest.approx(np.linalg.norm(layer), rel=1e-5)
        others = sum(unit[other] for other in files if other != name)
        expected = unit[name] @ others / np.linalg.norm(others)
        assert facts["cosine_to_others"] == pytest.approx(expected, abs=1e-5)
        for other in files:
            assert found["cosines"][name][other] == pytest.approx(unit[name] @ unit[other], abs=1e-5)


def test_scaled_and_flipped_vectors_stand_out_and_nobody_else(tmp_path: Path) -> None:
    found = survey(vectors(tmp_path, 6, d2=8.0, d4=-1.0))["vectors"]
    marks = {name: facts["stands_out"] for name, facts in found.items()}
    assert marks.pop("d2") == ["norm", "norm:layer-0", "norm:layer-1", "norm:rest"]
    assert marks.pop("d4") == ["cosine", "opposed"]
    assert set(map(tuple, marks.values())) == {()}


def test_honest_vectors_do_not_stand_out(tmp_path: Path) -> None:
    found = survey(vectors(tmp_path, 5, d0=0.7, d1=1.3))
    assert [facts["stands_out"] for facts in found["vectors"].values()] == [[]] * 5
    assert "no clean bill" in found["note"]


def test_among_few_domains_nothing_is_marked(tmp_path: Path) -> None:
    found = survey(vectors(tmp_path, MIN_DOMAINS - 1, d0=-50.0))["vectors"]
    assert [facts["stands_out"] for facts in found.values()] == [[]] * (MIN_DOMAINS - 1)
    assert found["d0"]["cosine_to_others"] < 0


def test_one_vector_has_no_others(tmp_path: Path) -> None:
    (facts,) = survey(vectors(tmp_path, 1))["vectors"].values()
    assert (facts["cosine_to_others"], facts["cosine_score"], facts["norm_score"]) == (None, None, 0.0)


def test_scores_without_spread() -> None:
    assert scores([2.0, 2.0, 2.0]) == [0.0, 0.0, 0.0]
    assert scores([1.0, 1.0, 1.0, 5.0])[3] == pytest.approx(4 / (1.253314 * 1.0))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    files = vectors(tmp_path, 2)
    write_vector(files["d1"], {"pooler.weight": torch.ones(20, 10)})
    with pytest.raises(VectorError, match="d0 and d1 have other tensors"):
        survey(files)
