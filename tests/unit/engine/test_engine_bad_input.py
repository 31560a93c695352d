"""What cannot be merged is refused with file and tensor; what is odd has a defined result and a warning."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import moved, random_tensors, write_model

from common.errors import (
    BaseMismatchError,
    ConfigError,
    DataError,
    IsthmusError,
    ModelError,
    StorageError,
    VectorError,
)
from server.engine import inputs
from server.engine.recipe import ModelEntry, Recipe
from server.engine.run import merge_folders

Family = dict[str, Path]
WORDS = "embeddings.word_embeddings.weight"
BIAS = "encoder.layer.0.dense.bias"


def merge(family: Family, method: str = "ties", *, force: bool = False, **more: Any) -> dict[str, Any]:
    entries = tuple(ModelEntry(path, label) for label, path in family.items() if label != "base")
    out = more.pop("out", family["base"].parent / "out")
    recipe = Recipe(models=entries, method=method, out=out, base=family["base"], **more)
    return merge_folders(recipe, force=force)


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def _without_bias(family: Family) -> None:
    found = weights(family["toys"])
    del found[BIAS]
    write_model(family["toys"], found)


def _changed(**tensors: Any) -> Callable[[Family], None]:
    def change(family: Family) -> None:
        write_model(family["toys"], {**weights(family["toys"]), **{_name(k): t for k, t in tensors.items()}})

    return change


def _name(key: str) -> str:
    return {"bias": BIAS, "words": WORDS}.get(key, key)


def _config(family: Family) -> None:
    write_model(family["toys"], weights(family["toys"]), config={"hidden_size": 8})


def _pickled(family: Family) -> None:
    (family["toys"] / "model.safetensors").unlink()
    (family["toys"] / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _truncated(family: Family) -> None:
    path = family["toys"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _no_header(family: Family) -> None:
    (family["toys"] / "model.safetensors").write_bytes(b"\x00" * 20)


def _no_weights(family: Family) -> None:
    (family["toys"] / "model.safetensors").unlink()


def _a_file(family: Family) -> None:
    shutil.rmtree(family["toys"])
    family["toys"].write_text("no folder")


def _no_folder(family: Family) -> None:
    shutil.rmtree(family["toys"])


def _other_buffers(family: Family) -> None:
    for label, last in (("base", 3), ("toys", 4)):
        ids = np.array([1, 2, last])
        write_model(family[label], {**weights(family[label]), "position_ids": ids})


def _index_lies(family: Family) -> None:
    write_model(family["toys"], weights(family["toys"]), shards=2)
    (family["toys"] / "model.safetensors").unlink()
    path = family["toys"] / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"][BIAS] = "model-00002-of-00002.safetensors"
    data["weight_map"][WORDS] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(data))


def _index_leads_out(family: Family) -> None:
    path = family["toys"] / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {BIAS: "../base/model.safetensors"}}))


def _base_not_finite(family: Family) -> None:
    write_model(family["base"], {**weights(family["base"]), BIAS: np.full(4, np.inf, np.float32)})


def _no_config(family: Family) -> None:
    (family["base"] / "config.json").unlink()


NAN = np.array([0, np.nan, 0, 0], np.float32)
CASES: list[tuple[Callable[[Family], None], type[IsthmusError], str]] = [
    (_config, BaseMismatchError, r"toys/config.json: hidden_size is 8, the base has 4"),
    (_without_bias, VectorError, rf"toys: has no tensor '{BIAS}'"),
    (_changed(extra=np.ones(2, np.float32)), VectorError, "toys/model.safetensors: tensor 'extra' is not in"),
    (
        _changed(words=np.ones((6, 4), np.float32)),
        VectorError,
        rf"toys/model.safetensors: tensor '{WORDS}' has shape \[6, 4\], the base has \[5, 4\]",
    ),
    (_changed(bias=np.ones(4, np.int64)), VectorError, rf"tensor '{BIAS}' has dtype I64, the base has F32"),
    (_changed(bias=np.ones(4)), VectorError, rf"tensor '{BIAS}' has dtype F64; F32, BF16 and F16"),
    (_changed(bias=NAN), VectorError, rf"toys/model.safetensors: tensor '{BIAS}' holds NaN"),
    (_changed(bias=NAN + np.inf), VectorError, rf"toys/model.safetensors: tensor '{BIAS}' holds NaN or inf"),
    (_base_not_finite, VectorError, rf"base/model.safetensors: tensor '{BIAS}' holds NaN or infinite"),
    (_other_buffers, VectorError, r"toys/model.safetensors: tensor 'position_ids' \(I64\) differs"),
    (_pickled, ModelError, "toys/pytorch_model.bin: is pickled"),
    (_truncated, ModelError, "toys/model.safetensors: not a well-formed safetensors file"),
    (_no_header, ModelError, "toys/model.safetensors: not a well-formed safetensors file"),
    (_no_weights, ModelError, "toys: no model.safetensors"),
    (_a_file, ModelError, "toys: is a file"),
    (_no_folder, ModelError, "toys: no such model folder"),
    (_no_config, ConfigError, "base: has no config.json"),
    (_index_lies, ModelError, "toys/model.safetensors.index.json: tensor .* is not in the file"),
    (_index_leads_out, ModelError, rf"tensor '{BIAS}' is not in a safetensors file of this folder"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_refused(family: Family, change: Any, error: type[IsthmusError], message: str) -> None:
    change(family)
    with pytest.raises(error, match=message) as caught:
        merge(family)
    assert caught.value.next_step
    left = {path.name for path in family["base"].parent.iterdir()}
    assert left <= {"base", "beauty", "toys", "cache"}


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("tees", {}, "did you mean 'ties'"),
        ("ties.x", {}, "unknown merge method 'ties.x'"),
        ("_select", {}, "unknown merge method '_select'"),
        ("knots", {}, "merge method 'knots' merges adapters, and the models are full ones"),
        ("ties", {"options": {"desnity": 0.2}}, "did you mean 'density'"),
        ("ties", {"options": {"density": 1.5}}, "density: Input should be less than or equal to 1"),
        ("ties", {"options": {"density": "0.2"}}, "density: Input should be a valid number"),
        ("task-arithmetic", {"options": {"lambda": float("nan")}}, "lambda: Input should be a finite number"),
        ("dare", {"options": {"seed": -1}}, "seed: Input should be greater than or equal to 0"),
        ("mergerec", {}, "needs the catalog of every model; 'beauty' has none"),
        ("regmean", {}, "needs the catalog of every model; 'beauty' has none"),
    ],
)
def test_methods_and_options_are_checked(
    family: Family, method: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(family, method, **more)


def test_an_output_folder_that_exists_is_replaced_by_force_alone(family: Family, tmp_path: Path) -> None:
    merge(family)
    with pytest.raises(ConfigError, match=r"out: exists already\n  next: .*--force"):
        merge(family)
    (tmp_path / "out" / "stray").write_text("old")
    merge(family, "weight-averaging", force=True)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["method"] == "weight-averaging"
    assert not (tmp_path / "out" / "stray").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not a model folder"):
        merge(family, force=True, out=tmp_path / "letters")
    assert (tmp_path / "letters" / "mine.txt").exists()


@pytest.mark.parametrize("where", ["base", "toys/merged", "."])
def test_an_output_among_the_inputs_is_refused(family: Family, tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match="is, holds or lies in the input folder"):
        merge(family, force=True, out=tmp_path / where)
    assert weights(family["base"])


def test_a_failed_merge_keeps_the_older_result(family: Family, tmp_path: Path) -> None:
    merge(family)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    _changed(bias=NAN)(family)
    with pytest.raises(VectorError):
        merge(family, force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    base = {"w": np.full(3, 60000, np.float16)}
    folders = {"base": write_model(tmp_path / "base", base)}
    folders["m"] = write_model(tmp_path / "m", {"w": np.full(3, 65000, np.float16)})
    with pytest.raises(VectorError, match="tensor 'w': a merged value is beyond the range of F16"):
        merge(folders, "task-arithmetic", options={"lambda": 4.0})
    with pytest.raises(VectorError, match="tensor 'w': a merged value is beyond the range of F32"):
        merge(folders, "task-arithmetic", options={"lambda": 3e38}, dtype="fp32")
    with pytest.raises(VectorError, match="tensor 'w': a merged value is beyond the range of F32"):
        merge(folders, "dare", options={"lambda": 3e38, "p": 0.0}, dtype="fp32")  # the vector is sound


def test_the_last_value_that_bfloat16_rounds_to_a_number(tmp_path: Path) -> None:
    largest = np.float32((2 - 2**-7) * 2.0**127)
    limit = np.float32((2 - 2**-8) * 2.0**127)  # halfway to the next: its nearest bfloat16 is infinite
    folders = {"base": write_model(tmp_path / "base", {"w": np.zeros(2, np.float32)})}
    for sign in (1, -1):
        below = np.full(2, sign * np.nextafter(limit, np.float32(0)), np.float32)
        folders["m"] = write_model(tmp_path / f"below{sign}", {"w": below})
        merge(folders, "weight-averaging", dtype="bf16", force=True)
        bits = (tmp_path / "out" / "model.safetensors").read_bytes()[-4:]
        assert np.frombuffer(bits, np.uint16).astype(np.uint32)[0] << 16 == (sign * largest).view(np.uint32)
        folders["m"] = write_model(tmp_path / f"at{sign}", {"w": np.full(2, sign * limit, np.float32)})
        with pytest.raises(VectorError, match="beyond the range of BF16"):
            merge(folders, "weight-averaging", dtype="bf16", force=True)


def test_odd_inputs_are_defined_and_warned_of(family: Family, tmp_path: Path) -> None:
    alone = {label: family[label] for label in ("base", "toys")}
    assert merge(alone, "weight-averaging")["warnings"] == [
        "one model only; the method is applied to it alone"
    ]
    np.testing.assert_allclose(weights(tmp_path / "out")[WORDS], weights(family["toys"])[WORDS], rtol=1e-6)

    copy = shutil.copytree(family["toys"], tmp_path / "copy")
    found = merge({**family, "copy": copy}, force=True)["warnings"]
    assert found == ["copy and toys have the same weights; they count twice"]
    found = merge({**family, "again": family["toys"]}, force=True)["warnings"]
    assert found == ["again and toys have the same weights; they count twice"]
    found = merge({**family, "itself": family["base"]}, force=True)["warnings"]
    assert found == ["itself equals the base: its task vector is zero and counts as one"]

    same = write_model(tmp_path / "same", weights(family["base"]))
    for method in ("ties", "task-arithmetic", "dare", "emr"):
        found = merge({"base": family["base"], "same": same, "same2": same}, method, force=True)["warnings"]
        assert "same equals the base: its task vector is zero and counts as one" in found
        assert not any("same weights" in warning for warning in found)
        name = "model.safetensors"
        assert (tmp_path / "out" / name).read_bytes()[-100:] == (family["base"] / name).read_bytes()[-100:]


def test_a_model_of_another_base_of_the_same_shapes_is_warned_of(family: Family, tmp_path: Path) -> None:
    family["other"] = write_model(tmp_path / "other", random_tensors(9))
    (warning,) = merge(family, "weight-averaging")["warnings"]
    assert re.fullmatch(
        r"other lies 1\d\d% of the base's norm away from the base: was it fine.*one\?", warning
    )


def test_dtypes_may_differ_with_a_warning(family: Family, tmp_path: Path) -> None:
    short = {name: tensor.astype(np.float16) for name, tensor in weights(family["toys"]).items()}
    write_model(family["toys"], short)
    (warning,) = merge(family, "weight-averaging")["warnings"]
    assert warning.startswith("toys: holds F16 where the base has F32")
    base, beauty = weights(family["base"])[WORDS], weights(family["beauty"])[WORDS]
    wanted = base + ((beauty - base) + (short[WORDS].astype(np.float32) - base)) / 2
    np.testing.assert_allclose(weights(tmp_path / "out")[WORDS], wanted, rtol=1e-6)
    assert weights(tmp_path / "out")[WORDS].dtype == np.float32


def test_the_result_may_be_float16(family: Family, tmp_path: Path) -> None:
    merge(family, "weight-averaging", out=tmp_path / "wide")
    merge(family, "weight-averaging", dtype="fp16")
    for name, values in weights(tmp_path / "out").items():
        assert values.dtype == np.float16
        np.testing.assert_array_equal(values, weights(tmp_path / "wide")[name].astype(np.float16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tied_layers_and_buffers_follow_the_base(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (5, 4), "norm.weight": (4,)}
    base = random_tensors(0, shapes)
    tied = {**base, "lm_head.weight": base["model.embed_tokens.weight"]}
    model = moved(base, 1)
    buffers = {"position_ids": np.arange(3)}

    folders = {"base": write_model(tmp_path / "base", {**tied, **buffers})}
    folders["m"] = write_model(tmp_path / "m", model)  # stores neither the tied layer nor the buffer
    merge(folders, "weight-averaging")
    merged = weights(tmp_path / "out")
    assert np.array_equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert np.array_equal(merged["position_ids"], buffers["position_ids"])

    folders = {"base": write_model(tmp_path / "base2", base)}
    full = {**model, "lm_head.weight": model["model.embed_tokens.weight"], **buffers}
    folders["m"] = write_model(tmp_path / "m2", full)
    warnings = merge(folders, "weight-averaging", force=True)["warnings"]
    assert "m: tensor 'lm_head.weight' is not in the base and was left out" in warnings
    assert "m: tensor 'position_ids' is not in the base and was left out" in warnings
    assert weights(tmp_path / "out").keys() == base.keys()
    write_model(folders["m"], full, config={"tie_word_embeddings": False})
    with pytest.raises(VectorError, match=r"tensor 'lm_head.weight' is not in the base"):
        merge(folders, force=True)


def test_sentence_modules_with_weights_merge_too(family: Family, tmp_path: Path) -> None:
    for seed, folder in enumerate(family.values()):
        modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
        (folder / "2_Dense").mkdir()
        dense = {"linear.weight": np.full((2, 2), seed, np.float32)}
        save_file(dense, folder / "2_Dense" / "model.safetensors")
    merge(family, "weight-averaging")
    merged = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert merged["linear.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    (family["toys"] / "modules.json").write_text(json.dumps([{"path": "../base"}]))
    with pytest.raises(ModelError, match="a module's path is not inside the folder"):
        merge(family, force=True)


def test_more_models_than_memory_are_refused_where_they_must_be_in_it(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "available_bytes", lambda: 2 * 4 * 20 - 1)  # the largest tensor has 20 values
    with pytest.raises(
        ConfigError, match=r"method 'wudi' holds .* of 2 models at once, .*\n  next: merge few"
    ):
        merge(family, "wudi")
    merge(family, "ties")
    monkeypatch.setattr(inputs, "available_bytes", lambda: 2 * 4 * 20)
    merge(family, "wudi", force=True)
    monkeypatch.undo()
    found = inputs.available_bytes()
    assert found is None or found > 1 << 20


def test_a_file_that_changes_meanwhile_is_noticed(family: Family) -> None:
    def report(*, phase: str, step: int = 0, **_: Any) -> None:
        if step == 1:
            write_model(family["toys"], weights(family["toys"]))

    entries = tuple(ModelEntry(family[label], label) for label in ("beauty", "toys"))
    recipe = Recipe(entries, "ties", family["base"].parent / "out", family["base"])
    with pytest.raises(ModelError, match=r"toys/model.safetensors: changed while it was read"):
        merge_folders(recipe, report=report)


class _Refused:
    """`os.open` that may not open one file: the tests may run as root, whom no mode keeps out."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, os.open

    def __call__(self, path: Any, *more: Any, **keywords: Any) -> int:
        if Path(path).name == self.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return self.open(path, *more, **keywords)


@pytest.mark.parametrize("name", ["model.safetensors", ".out.merging.jsonl"])
def test_a_file_that_may_not_be_opened_is_named(
    family: Family, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "open", _Refused(name))
    with pytest.raises(StorageError, match=rf"{name}: Permission denied\n  next: check that path"):
        merge(family)


def test_an_output_below_a_file_is_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(StorageError, match="letter: File exists"):
        merge(family, out=tmp_path / "letter" / "out")
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_catalog_with_empty_texts_is_refused(family: Family, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"isthmus.catalog": "1", "isthmus.domain": "toys"}
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("item_id", "title")]
    table = pa.table(
        {"item_id": ["a", "b"], "title": ["ball", ""]}, schema=pa.schema(fields, metadata=metadata)
    )
    pq.write_table(table, tmp_path / "items.parquet")
    entries = tuple(ModelEntry(family[name], name, tmp_path / "items.parquet") for name in ("beauty", "toys"))
    recipe = Recipe(entries, "adamerging", tmp_path / "out", family["base"])
    with pytest.raises(DataError, match=r"items.parquet: the item in row 1 has no text"):
        merge_folders(recipe)
    with pytest.raises(DataError, match="no such catalog"):
        entry = ModelEntry(family["toys"], "toys", tmp_path / "none.parquet")
        merge_folders(Recipe((entry,), "adamerging", tmp_path / "out", family["base"]))


def test_settings_of_no_use_are_warned_of(family: Family) -> None:
    entries = {"learning": {"steps": 3}, "text": {"max_seq_len": 9}, "device": "cuda"}
    assert merge(family, "ties", **entries)["warnings"] == [
        "the [learning] section was not used: ties learns nothing",
        "the [text] section was not used: ties reads no texts",
        "device cuda was not used: ties runs on the processor",
    ]


def test_the_seed_of_a_recipe_is_that_of_a_method_that_draws(family: Family) -> None:
    assert merge(family, "dare", seed=7)["options"]["seed"] == 7
    assert merge(family, "dare", seed=7, options={"seed": 3}, force=True)["options"]["seed"] == 3
    assert "seed" not in merge(family, "ties", seed=7, force=True)["options"]


@pytest.mark.parametrize("given", [{"dtype": "bf16"}, {"device": "cuda"}, {"learning": {"steps": 3}}])
def test_settings_that_adapters_cannot_have_are_refused(family: Family, given: dict[str, Any]) -> None:
    for label in ("beauty", "toys"):
        (family[label] / "adapter_config.json").write_text("{}")
    (key,) = given
    with pytest.raises(ConfigError, match=f"{key} was given, but the models are adapters"):
        merge(family, "product", **given)


def test_adapters_and_models_do_not_mix(family: Family) -> None:
    (family["toys"] / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="beauty is a full model, but other models are adapters"):
        merge(family)
