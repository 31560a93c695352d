"""`merge_folders`: values, files, resuming, what is written beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_models import CONFIG, SHAPES, moved, random_tensors, write_model

from common.errors import ConfigError, StorageError
from server.engine import staging
from server.engine.inputs import Inputs
from server.engine.recipe import ModelEntry, Recipe
from server.engine.run import merge_folders
from server.merging import InMemory, Unit, merge, methods
from server.merging._vectors import BLOCK_VALUES

Tensors = dict[str, np.ndarray[Any, Any]]


def recipe(base: Path, models: dict[str, Path], out: Path, method: str = "ties", **more: Any) -> Recipe:
    entries = tuple(ModelEntry(path, label) for label, path in models.items())
    return Recipe(models=entries, method=method, out=out, base=base, **more)


def of(family: dict[str, Path], out: Path, method: str = "ties", **more: Any) -> Recipe:
    models = {label: path for label, path in family.items() if label != "base"}
    return recipe(family["base"], models, out, method, **more)


def expected(base: Tensors, models: dict[str, Tensors], method: str, options: dict[str, Any]) -> Tensors:
    taus = {label: {name: model[name] - base[name] for name in base} for label, model in models.items()}
    merged = merge(method, InMemory(taus), options)
    return {name: base[name] + merged[name] for name in base}


def raw(folder: Path, name: str) -> bytes:
    """The stored bytes of one tensor of `model.safetensors`."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    return data[8 + size + start : 8 + size + stop]


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=4),
    st.integers(-2, 2),
    st.integers(1, 2),
    st.sampled_from(["weight-averaging", "task-arithmetic", "ties", "dare", "iso-c"]),
)
def test_files_merge_as_arrays_in_memory_do(
    count: int, small: list[list[int]], around: int, shards: int, method: str
) -> None:
    shapes = {f"t{index}": tuple(shape) for index, shape in enumerate(small)}
    shapes["long"] = (BLOCK_VALUES + around,)
    shapes["matrix"] = (3, 30011)  # two blocks, the second not full
    base = random_tensors(count, shapes)
    models = {f"m{seed}": moved(base, seed) for seed in range(count)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "base", base, shards=shards)
        paths = {label: write_model(folder / label, model) for label, model in models.items()}
        merge_folders(recipe(folder / "base", paths, folder / "out", method))
        found: Tensors = {}
        for file in (folder / "out").glob("*.safetensors"):
            found |= load_file(file)
    wanted = expected(base, models, method, {})
    assert found.keys() == wanted.keys()
    for tensor in wanted:
        np.testing.assert_array_equal(found[tensor], wanted[tensor])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_zero_coefficient_gives_the_bytes_of_the_base(tmp_path: Path, dtype: Any) -> None:
    base = {name: tensor.astype(dtype) for name, tensor in random_tensors(0).items()}
    base["encoder.layer.0.dense.bias"][:2] = (-0.0, 0.0)
    base["embeddings.position_ids"] = np.arange(6).reshape(1, 6)
    model = {**moved(base, 1), "embeddings.position_ids": base["embeddings.position_ids"]}
    model = {name: tensor.astype(base[name].dtype) for name, tensor in model.items()}
    folders = {"base": write_model(tmp_path / "base", base), "m": write_model(tmp_path / "m", model)}
    merge_folders(of(folders, tmp_path / "out", "task-arithmetic", options={"lambda": 0.0}))
    for name in base:
        assert raw(tmp_path / "out", name) == raw(tmp_path / "base", name)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([name for name, method in methods().items() if not method.needs]),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.booleans(),
)
def test_zero_weights_and_a_zero_lambda_give_the_base(
    method: str, count: int, seed: int, weighted: bool
) -> None:
    base = random_tensors(seed, {**SHAPES, "logit_scale": (), "nothing": (0, 4)})
    base["encoder.layer.0.dense.bias"][0] = -0.0
    options = {} if weighted or "lambda" not in methods()[method].resolve({}) else {"lambda": 0.0}
    weight = None if options else 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "base", base)
        entries = tuple(
            ModelEntry(write_model(folder / f"m{n}", moved(base, seed + n)), f"m{n}", weight=weight)
            for n in range(1, count + 1)
        )
        merge_folders(Recipe(entries, method, folder / "out", folder / "base", options), digests=False)
        for tensor in base:
            assert raw(folder / "out", tensor) == raw(folder / "base", tensor), (method, tensor)


def test_bfloat16_is_read_exactly_and_rounded_to_even(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, generator=generator).bfloat16()}
    models = {label: {"w": torch.randn(300, generator=generator).bfloat16()} for label in ("a", "b")}
    for label, tensors in {"base": base, **models}.items():
        write_model(tmp_path / label, {})
        save_torch(tensors, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
    folders = {label: tmp_path / label for label in ("base", "a", "b")}
    merge_folders(of(folders, tmp_path / "out", "weight-averaging"))
    merge_folders(of(folders, tmp_path / "wide", "weight-averaging", dtype="fp32"))
    tau = sum(model["w"].float() - base["w"].float() for model in models.values()) / 2
    exact = base["w"].float() + tau
    assert torch.equal(load_torch(tmp_path / "wide" / "model.safetensors")["w"], exact)
    assert torch.equal(load_torch(tmp_path / "out" / "model.safetensors")["w"], exact.bfloat16())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_shards_and_companions_are_the_bases(family: dict[str, Path], tmp_path: Path) -> None:
    base = write_model(tmp_path / "sharded", load_file(family["base"] / "model.safetensors"), shards=2)
    (base / "README.md").write_text("of the base")
    (base / "pytorch_model.bin").write_bytes(b"no")
    (base / "LICENSE").write_text("free")
    record = merge_folders(of({**family, "base": base}, tmp_path / "out"))
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.json", "vocab.txt", "LICENSE", "README.md", "merge.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    with safe_open(out / "model-00001-of-00002.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert record == json.loads((out / "merge.json").read_text())


def test_a_weight_scales_a_vector(family: dict[str, Path], tmp_path: Path) -> None:
    entries = (
        ModelEntry(family["beauty"], "beauty", weight=0.5),
        ModelEntry(family["toys"], "toys", weight=0),
    )
    found = Recipe(entries, "task-arithmetic", tmp_path / "out", family["base"], {"lambda": 1.0})
    merge_folders(found)
    base, beauty, merged = (
        load_file(folder / "model.safetensors")
        for folder in (family["base"], family["beauty"], tmp_path / "out")
    )
    for name in base:
        np.testing.assert_array_equal(
            merged[name], base[name] + np.float32(0.5) * (beauty[name] - base[name]) + np.float32(0)
        )


def test_what_the_folder_says_about_itself(family: dict[str, Path], tmp_path: Path) -> None:
    record = merge_folders(of(family, tmp_path / "out", options={"density": 0.5}))
    assert record["options"] == {"density": 0.5, "lambda": 1.0}
    assert record["peak_memory_bytes"] > 10_000_000
    values = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert record["bytes_read"] >= 3 * 4 * values
    assert record["bytes_written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    weights = family["toys"] / "model.safetensors"
    assert record["models"]["toys"]["files"] == {
        "model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["models"]["toys"]["sha256"] in card
    assert "density = 0.5" in card
    assert "AutoModel" in card
    for text in (card, json.dumps(record)):
        assert str(tmp_path) not in text


def test_digests_are_remembered_and_can_be_left_out(
    family: dict[str, Path], tmp_path: Path, own_cache: Path
) -> None:
    weights = family["toys"] / "model.safetensors"
    for folder in family.values():
        os.utime(folder / "model.safetensors", (1, 1))
    staged = of(family, tmp_path / "out")
    first = merge_folders(staged)
    assert not own_cache.exists() or "sha256" not in own_cache.read_text()  # too fresh to be sure
    found = weights.stat()
    known = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    own_cache.write_text(json.dumps({str(weights): {"stamp": known, "sha256": "remembered"}}))
    second = merge_folders(staged, force=True)
    assert second["models"]["toys"]["files"]["model.safetensors"] == "remembered"
    assert second["models"]["beauty"] == first["models"]["beauty"]
    weights.touch()
    assert merge_folders(staged, force=True)["models"]["toys"] == first["models"]["toys"]
    without = merge_folders(staged, force=True, digests=False)
    assert without["base"]["sha256"] is None
    assert "not computed" in (tmp_path / "out" / "README.md").read_text()


class _Stop:
    """A report that interrupts at the second tensor."""

    def __call__(self, *, phase: str, step: int = 0, **_: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt


def test_an_interrupted_merge_goes_on(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.engine import passes

    monkeypatch.setattr(passes, "CHECKPOINT_BYTES", 1)
    merge_folders(of(family, tmp_path / "whole"))
    stopped = of(family, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        merge_folders(stopped, report=_Stop())
    assert not (tmp_path / "out").exists()
    staged = tmp_path / ".out.merging" / "model.safetensors"
    assert staged.exists()
    record = merge_folders(stopped)
    assert record["resumed_tensors"] == 1
    assert not record["warnings"]
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_inputs_begin_anew(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.engine import passes

    monkeypatch.setattr(passes, "CHECKPOINT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        merge_folders(of(family, tmp_path / "out"), report=_Stop())
    write_model(family["toys"], moved(random_tensors(0), 9))
    assert merge_folders(of(family, tmp_path / "out"))["resumed_tensors"] == 0
    merge_folders(of(family, tmp_path / "whole"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from server.engine import passes, run
from server.engine.recipe import read_recipe
passes.CHECKPOINT_BYTES = 1
def report(*, phase, step=0, **_):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
run.merge_folders(read_recipe(Path(sys.argv[1])), report=report)
"""


def test_a_killed_merge_goes_on(family: dict[str, Path], tmp_path: Path) -> None:
    text = (
        'base = "base"\nmethod = "ties"\nout = "out"\n[[model]]\npath = "beauty"\n[[model]]\npath = "toys"\n'
    )
    (tmp_path / "recipe.toml").write_text(text)
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.toml")], timeout=250)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert merge_folders(of(family, tmp_path / "out"))["resumed_tensors"] == 2
    merge_folders(of(family, tmp_path / "whole"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_leaves_nothing(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            merge_folders(of(family, tmp_path / "out"), digests=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "beauty", "toys", "cache"}

    class Small:
        f_bavail, f_frsize = 1, 100

    monkeypatch.setattr(staging.os, "statvfs", lambda _: Small())
    with pytest.raises(StorageError, match="the disk has 100 bytes free"):
        merge_folders(of(family, tmp_path / "out"), digests=False)


def test_memory_does_not_grow_with_the_number_of_models(tmp_path: Path) -> None:
    import tracemalloc

    shapes = {f"t{index}": (1 << 17,) for index in range(4)}
    base = random_tensors(0, shapes)
    folders = {"base": write_model(tmp_path / "base", base)}
    for seed in range(1, 5):
        folders[f"m{seed}"] = write_model(tmp_path / f"m{seed}", moved(base, seed))
    del base
    tracemalloc.start()
    merge_folders(of(folders, tmp_path / "out", "task-arithmetic"), digests=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.2e6  # one block of four models and a few of one; a model has 2.1 MB


def test_loads_as_the_base_does(pico_sentence_model: Path, make_pico: Any, tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    models = {name: make_pico(tmp_path / name, seed=seed) for seed, name in ((2, "a"), (3, "b"))}
    base = shutil.copytree(pico_sentence_model, tmp_path / "base")
    (base / "2_Normalize").rmdir()  # packages cannot hold an empty folder
    merge_folders(recipe(base, models, tmp_path / "out", "weight-averaging"))
    weights = [load_file(folder / "model.safetensors") for folder in models.values()]
    name = "encoder.layer.0.output.dense.weight"
    model = AutoModel.from_pretrained(tmp_path / "out")
    found = dict(model.named_parameters())[name].detach().numpy()
    np.testing.assert_allclose(found, (weights[0][name] + weights[1][name]) / 2, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    embedding = sentence.encode(["red oak spoon"])
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    assert "SentenceTransformer" in (tmp_path / "out" / "README.md").read_text()


def test_a_staging_folder_without_its_files_begins_anew(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.engine import passes

    monkeypatch.setattr(passes, "CHECKPOINT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        merge_folders(of(family, tmp_path / "out"), report=_Stop())
    (tmp_path / ".out.merging" / "model.safetensors").unlink()
    assert merge_folders(of(family, tmp_path / "out"))["resumed_tensors"] == 0
    merge_folders(of(family, tmp_path / "whole"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_merge_at_a_time_writes_a_folder(family: dict[str, Path], tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".out.merging.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="out: another merge is writing it"):
            merge_folders(of(family, tmp_path / "out"))
    merge_folders(of(family, tmp_path / "out"))


def test_the_older_result_comes_back_after_a_kill_between_two_renames(
    family: dict[str, Path], tmp_path: Path
) -> None:
    merge_folders(of(family, tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(ConfigError, match="out: exists already"):
        merge_folders(of(family, tmp_path / "out"))
    assert (tmp_path / "out" / "merge.json").exists()


@pytest.mark.parametrize("unit", get_args(Unit))
def test_blocks_hold_what_their_unit_says(tmp_path: Path, unit: Unit) -> None:
    """Every value once, in order, and no more at once than the unit needs; from folders as from memory."""
    shapes: dict[str, tuple[int, ...]] = {
        "bias": (70_000,),
        "conv": (3, 30_000, 2),
        "dense.weight": (300, 256),
        "embeddings.word_embeddings.weight": (300, 256),
        "empty": (0, 3),
        "scale": (),
    }
    blocks = dict.fromkeys(shapes, BLOCK_VALUES)
    whole = {name: max(1, int(np.prod(shape))) for name, shape in shapes.items()}
    at_most: dict[Unit, dict[str, int]] = {
        "block": blocks,
        "rows": {**blocks, "bias": 70_000, "conv": 60_000},
        "matrix": {**blocks, "dense.weight": 300 * 256},
        "tensor": whole,
    }
    base = random_tensors(0, shapes)
    folders = {"base": write_model(tmp_path / "base", base)}
    taus = {}
    for seed, label in enumerate(("a", "b"), start=1):
        model = moved(base, seed)
        folders[label] = write_model(tmp_path / label, model)
        taus[label] = {name: model[name] - base[name] for name in base}
    found = dict.fromkeys(shapes, 0)
    with Inputs(of(folders, tmp_path / "out")).vectors() as vectors:
        for block, same in zip(vectors.blocks(unit), InMemory(taus).blocks(unit), strict=True):
            assert (block.name, block.start) == (same.name, same.start)
            assert block.start == found[block.name]
            found[block.name] = block.stop
            width = block.tau_NX.shape[1]
            assert width == min(at_most[unit][block.name], whole[block.name] - block.start)
            assert block.is_linear == (block.name == "dense.weight" and unit in ("matrix", "tensor"))
            np.testing.assert_array_equal(block.tau_NX, same.tau_NX)
    assert found == {**whole, "empty": 0}
