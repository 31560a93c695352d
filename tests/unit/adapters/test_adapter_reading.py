"""Adapter folders that cannot be merged are refused by file and tensor, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import ConfigError, ModelError, VectorError
from common.language.peft_folder import read_adapter
from server.adapters import adapter_methods, is_adapter, merge_adapters

Make = Callable[..., Path]
QUERY = "base_model.model.encoder.layer.0.query"


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_rank_and_scaling_follow_the_configuration(make_adapter: Make) -> None:
    adapter = read_adapter("a", make_adapter("plain", rank=2, lora_alpha=4))
    assert {module.scaling for module in adapter.modules.values()} == {2.0}
    adapter = read_adapter("a", make_adapter("rs", rank=2, lora_alpha=4, use_rslora=True))
    assert [module.scaling for module in adapter.modules.values()] == pytest.approx([4 / np.sqrt(2)] * 3)
    patterns = {
        "r": 7,
        "rank_pattern": {"query": 2, "layer.0.value": 2},
        "alpha_pattern": {"layer.0.query": 9},
    }
    adapter = read_adapter("a", make_adapter("patterns", rank=2, **patterns))
    assert {path: module.scaling for path, module in adapter.modules.items()} == {
        "encoder.layer.0.query": 4.5,
        "encoder.layer.0.value": 2.0,
        "encoder.layer.1.query": 2.0,
    }


def test_a_pattern_matches_whole_names_only(make_adapter: Make) -> None:
    """`yer.0.query` is not a name, so it matches no layer, as in PEFT."""
    adapter = read_adapter("a", make_adapter("a", alpha_pattern={"yer.0.query": 100}))
    assert {module.scaling for module in adapter.modules.values()} == {2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save = \['classifier'\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"some_future_key": 3}, "some_future_key = 3 is not supported"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"r": 0}, "r: expected a number above 0, got 0"),
        ({"r": True}, "r: expected a number above 0, got True"),
        ({"lora_alpha": None}, "lora_alpha: expected a number above 0, got None"),
        ({"rank_pattern": {"query": 1.5}}, "rank_pattern: query: expected a number"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["query"]}, r"extra tensor '.*value.lora_A.weight'"),
        ({"target_modules": ["query", "value", "key"]}, "no tensor of the target module 'key'"),
        ({"target_modules": "encoder.*query"}, "extra tensor"),
    ],
)
def test_unsupported_configurations_are_refused(
    make_adapter: Make, changes: dict[str, Any], message: str
) -> None:
    folder = make_adapter("bad", **changes)
    with pytest.raises((ModelError, VectorError), match=message) as caught:
        read_adapter("bad", folder)
    assert str(folder) in caught.value.message
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), f"no tensor '{QUERY}.lora_B.weight'"),
        (lambda t: t.update({"other": np.ones(1, np.float32)}), "extra tensor 'other'"),
        (
            lambda t: t.update({"base_model.model.words.lora_embedding_A": np.ones((2, 2), np.float32)}),
            "extra tensor 'base_model.model.words.lora_embedding_A'",
        ),
        (
            lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((3, 5), np.float32)}),
            rf"tensor '{QUERY}.lora_A.weight': expected shape \[2, 5\] .*, got \[3, 5\]",
        ),
        (
            lambda t: t.update({f"{QUERY}.lora_B.weight": np.ones((2, 2, 1, 1), np.float32)}),
            "expected two axes",
        ),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((2, 5), np.int64)}), "got I64"),
        (
            lambda t: t.update({f"{QUERY}.lora_A.weight": np.full((2, 5), np.nan, np.float32)}),
            f"tensor '{QUERY}.lora_A.weight': holds NaN",
        ),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_bad_tensors_are_refused(make_adapter: Make, change: Any, message: str) -> None:
    folder = edit(make_adapter("bad"), change)
    with pytest.raises(VectorError, match=message) as caught:
        read_adapter("bad", folder)
    assert "adapter_model.safetensors" in caught.value.message


def test_folders_that_are_no_adapter(make_adapter: Make, tmp_path: Path) -> None:
    assert is_adapter(make_adapter("good"))
    assert not is_adapter(tmp_path)
    pickled = make_adapter("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for folder, message in ((tmp_path, "no adapter_config.json"), (pickled, "no adapter_model.safetensors")):
        with pytest.raises(ModelError, match=message):
            read_adapter("bad", folder)
    broken = make_adapter("broken")
    (broken / "adapter_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_adapter("bad", broken)


def test_half_precision_is_read_exactly(make_adapter: Make, tmp_path: Path) -> None:
    halves = edit(make_adapter("half"), lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    tensors = load_file(halves / "adapter_model.safetensors")
    B_RK, A_KC = read_adapter("a", halves).factors("encoder.layer.0.query")
    assert A_KC.dtype == np.float32
    assert np.array_equal(A_KC, tensors[f"{QUERY}.lora_A.weight"])
    assert np.array_equal(B_RK, tensors[f"{QUERY}.lora_B.weight"])


def test_adapters_that_do_not_belong_together(make_adapter: Make, tmp_path: Path) -> None:
    one, out = make_adapter("one"), tmp_path / "out"
    lacking = edit(
        make_adapter("lacking"), lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{QUERY}.")]
    )
    with pytest.raises(VectorError, match=r"adapter b .* has no layer 'encoder.layer.0.query'"):
        merge_adapters({"a": one, "b": lacking}, method="product", out=out)
    with pytest.raises(VectorError, match=r"adapter a .* has no layer .*, which b has\n  next: obtain"):
        merge_adapters({"a": lacking, "b": one}, method="product", out=out)
    wide = edit(
        make_adapter("wide"), lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((2, 9), np.float32)})
    )
    with pytest.raises(VectorError, match=r"expected an update of shape \[6, 5\] .* got \[6, 9\]"):
        merge_adapters({"a": one, "b": wide}, method="product", out=out)
    with pytest.raises(VectorError, match="factors needs equal ranks, got 2 and 3"):
        merge_adapters({"a": one, "b": make_adapter("b", rank=3)}, method="factors", out=out)
    assert not out.exists()


def test_another_base_and_duplicates_are_warned_of(make_adapter: Make, tmp_path: Path) -> None:
    one, other = (
        make_adapter("one"),
        make_adapter("other", seed=1, base_model_name_or_path="/data/private/model"),
    )
    record = merge_adapters({"a": one, "b": other, "c": one}, method="product", out=tmp_path / "out")
    assert record["warnings"] == [
        "b names another base than a: local folder and acme/base",
        "c has the same tensors as a",
    ]
    assert "/data/private" not in (tmp_path / "out" / "README.md").read_text()
    assert "/data/private" not in (tmp_path / "out" / "merge.json").read_text()


def test_bad_methods_options_and_weights(make_adapter: Make, tmp_path: Path) -> None:
    adapters = {"north": make_adapter("north"), "south": make_adapter("south", seed=1)}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"method": "prodcut"}, "did you mean 'product'"),
        ({"method": "ties"}, "merges full models.*\n.*method = 'knots' with the option method = 'ties'"),
        ({"method": "product", "options": {"rnak": 2}}, "did you mean 'rank'"),
        ({"method": "product", "options": {"rank": 0}}, "rank"),
        ({"method": "knots", "options": {"method": "tise"}}, "did you mean 'ties'"),
        ({"method": "knots", "options": {"density": 2.0}}, "density"),
        (
            {"method": "knots", "options": {"method": "task-arithmetic", "density": 0.5}},
            "unknown key 'density'",
        ),
        ({"method": "knots", "options": {"method": "tsv-merge"}}, "does not work entry by entry"),
        ({"method": "elementwise", "options": {"method": "regmean"}}, "does not work entry by entry"),
        ({"method": "product", "weights": [1.0]}, "1 weights for 2 adapters"),
        ({"method": "product", "weights": {"north": 1.0}}, "adapter south: no weight"),
        ({"method": "product", "weights": {"nroth": 1.0, "south": 1.0}}, "did you mean 'north'"),
        ({"method": "product", "weights": [1.0, float("nan")]}, "nan is not a weight"),
        ({"method": "product", "weights": [1.0, 1e300]}, "is not a weight"),
    ]
    for arguments, message in bad:
        with pytest.raises(ConfigError, match=message):
            merge_adapters(adapters, out=tmp_path / "out", **arguments)
    with pytest.raises(ConfigError, match="no adapters"):
        merge_adapters({}, method="product", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_but_an_earlier_merge_is_overwritten(make_adapter: Make, tmp_path: Path) -> None:
    one, other, out = make_adapter("one"), make_adapter("other", seed=1), tmp_path / "out"
    with pytest.raises(ConfigError, match="is one of the inputs"):
        merge_adapters({"a": one, "b": other}, method="product", out=other)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not an earlier merge"):
        merge_adapters({"a": one}, method="product", out=mine)
    first = merge_adapters({"a": one, "b": other}, method="product", out=out)
    second = merge_adapters({"a": one, "b": other}, method="product", weights=[1, 2], out=out)
    assert first["weights_sha256"] != second["weights_sha256"]
    assert json.loads((out / "merge.json").read_text()) == second
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other", "out", "mine"}
    with pytest.raises(ConfigError, match="does not fit into float32"):
        huge = {path: (np.full_like(B, 1e38), A) for path, (B, A) in _factors(one).items()}
        folder = make_adapter("huge", factors=huge, lora_alpha=2)
        merge_adapters({"a": folder}, method="factors", weights=[1e6], out=out)
    assert json.loads((out / "merge.json").read_text()) == second


def _factors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    adapter = read_adapter("a", folder)
    return {path: adapter.factors(path) for path in adapter.modules}


def test_a_base_that_does_not_fit(make_adapter: Make, tmp_path: Path) -> None:
    shapes = {
        "encoder.layer.0.query": (6, 5),
        "encoder.layer.0.value": (4, 5),
        "encoder.layer.1.query": (6, 5),
    }

    def base(name: str, shapes: dict[str, tuple[int, int]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"bert.{path}.weight": np.zeros(shape, np.float32) for path, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return folder

    adapters = {"a": make_adapter("a")}
    record = merge_adapters(adapters, method="product", out=tmp_path / "out", base=base("good", shapes))
    alone = ["one adapter only; the rule is applied to it alone"]
    assert record["warnings"] == alone
    assert len(record["base"]["digest"]) == 64
    shards = base("shards", shapes)
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    index = {
        "weight_map": dict.fromkeys(
            (f"bert.{path}.weight" for path in shapes), "model-00001-of-00001.safetensors"
        )
    }
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    record = merge_adapters(adapters, method="product", out=tmp_path / "out", base=shards)
    assert (record["warnings"], record["base"]) == (alone, {"name": "acme/base"})
    more = base("more", shapes | {"encoder.layer.1.value": (4, 5)})
    record = merge_adapters(adapters, method="product", out=tmp_path / "out", base=more)
    assert "for example bert.encoder.layer.1.value" in record["warnings"][1]
    for name, wrong, message in (
        (
            "less",
            {"encoder.layer.0.query": (6, 5)},
            "'encoder.layer.0.value', which the base .* does not have",
        ),
        (
            "wide",
            shapes | {"encoder.layer.0.value": (4, 7)},
            r"has shape \[4, 5\], .*value.weight has \[4, 7\]",
        ),
    ):
        with pytest.raises(VectorError, match=message):
            merge_adapters(adapters, method="product", out=tmp_path / "out", base=base(name, wrong))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        merge_adapters(adapters, method="product", out=tmp_path / "out", base=tmp_path)


def test_neither_torch_nor_peft_is_imported(make_adapter: Make, tmp_path: Path) -> None:
    folder, out = str(make_adapter("a")), str(tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; from server.adapters import merge_adapters\n"
        f"merge_adapters({{'a': Path({folder!r})}}, method='knots', out=Path({out!r}))\n"
        "assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_rule_explains_itself() -> None:
    for method in adapter_methods().values():
        assert method.paper
        assert "A" in method.equation
        assert len(method.summary) > 60
