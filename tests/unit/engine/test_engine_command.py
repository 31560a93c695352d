"""The command: recipes and flags, output, what is imported, explanations; and merges that use catalogs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from tiny_models import moved, random_tensors, write_model

from common import cli as isthmus
from common.catalog import Catalog
from common.errors import ConfigError
from common.files import sha256_file
from server.engine import inputs
from server.engine.cli import merge
from server.engine.recipe import make_recipe, read_recipe
from server.engine.run import merge_folders
from server.merging import methods

Tensors = dict[str, np.ndarray[Any, Any]]
RECIPE = """
base = "base"
method = "task-arithmetic"
out = "merged"
options = { lambda = 0.5 }

[[model]]
path = "beauty"

[[model]]
path = "toys"
label = "games"
weight = 2
"""
HEAVY = {"torch", "pyarrow", "transformers", "pydantic", "rich", "typer", "scipy", "flwr", "cryptography"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(merge, [str(argument) for argument in arguments])


def test_a_recipe(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    shown = run(tmp_path / "recipe.toml")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("merged 2 by task-arithmetic into ")
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["options"] == {"lambda": 0.5}
    assert record["models"]["games"]["weight"] == 2
    other = run(tmp_path / "recipe.toml", "--out", tmp_path / "elsewhere")
    assert other.exit_code == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "elsewhere"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    again = shown_recipe(tmp_path / "merged")
    assert make_recipe({**again, "out": "x"}, where="card", folder=tmp_path).models[1].weight == 2


def test_flags_and_json(family: dict[str, Path], tmp_path: Path) -> None:
    shown = run(
        *("--base", family["base"], "--model", family["beauty"], "--model", f"games={family['toys']}"),
        *("--weight", "games=2", "--method", "task-arithmetic", "--option", "lambda=0.5"),
        *("--out", tmp_path / "flags", "--format", "json"),
    )
    assert shown.exit_code == 0, shown.output
    record = json.loads(shown.stdout)
    assert record["out"] == str(tmp_path / "flags")
    assert list(record["models"]) == ["beauty", "games"]
    assert record["seconds"] > 0
    assert not shown.stderr
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert run(tmp_path / "recipe.toml").exit_code == 0
    for name, values in load_file(tmp_path / "flags" / "model.safetensors").items():
        assert np.array_equal(values, load_file(tmp_path / "merged" / "model.safetensors")[name])


def test_warnings_go_to_stderr(family: dict[str, Path], tmp_path: Path) -> None:
    shown = run(
        *("--base", family["base"], "--model", family["toys"], "--method", "ties", "--out", tmp_path / "out")
    )
    assert shown.exit_code == 0
    assert shown.stderr == "warning: one model only; the method is applied to it alone\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lambda =", "lamda ="), r"unknown key 'lamda'\n  next: did you mean 'lambda'"),
        (
            ('method = "task', 'metod = "task'),
            r"recipe.toml: unknown key 'metod'\n  next: did you mean 'method'",
        ),
        (("label =", "lable ="), r"unknown key 'model.2.lable'\n  next: did you mean 'label'"),
        (('label = "games"', 'label = "beauty"'), "'beauty' is taken by another model"),
        (('label = "games"', 'label = "a|b"'), "must be letters, digits"),
        (("weight = 2", "weight = nan"), "model.2.weight: nan is out of range"),
        (("weight = 2", "weight = -1e7"), "model.2.weight: -1e.07 is out of range"),
        (("weight = 2", 'weight = "2"'), "model.2.weight: must be a number"),
        (('base = "base"', "base = 1"), "base: must be text"),
        (('base = "base"', ""), "names no base model"),
        (('base = "base"', 'base = "base"\ndtype = "fp8"'), "dtype: 'fp8' is not allowed"),
        (('base = "base"', 'base = "base"\nseed = -1'), "seed: must not be negative"),
        (('out = "merged"', ""), "no output folder"),
        (("[[model]]", "[[model"), "not valid TOML"),
        (('path = "beauty"', ""), "model.1.path: is missing"),
        (("lambda = 0.5", "lambda = [1]"), "options.lambda: must be a number, a text or true/false"),
    ],
)
def test_wrong_recipes(
    family: dict[str, Path], tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(*change, 1))
    shown = run(tmp_path / "recipe.toml")
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(shown.stderr.removeprefix("error: "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe.toml", "--method", "ties"), "--method and a recipe file were given"),
        (("none.toml",), "no such recipe"),
        (("--option", "density", "--out", "x"), "expected KEY=VALUE"),
        (("--weight", "no=1", "--model", "a", "--out", "x"), "no model is called 'no'"),
        (("--model", "a", "--method", "ties"), "no output folder"),
        (("--method", "ties", "--out", "x"), "no models"),
    ],
)
def test_wrong_flags(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr


def test_a_flag_names_the_model_that_the_result_names(family: dict[str, Path], tmp_path: Path) -> None:
    """Folders of one name in two places: the second is `toys-2`, for flags too."""
    other = write_model(tmp_path / "other" / "toys", moved(random_tensors(0), 5))
    spaced = write_model(tmp_path / "spiel zeug", moved(random_tensors(0), 6))
    models = [argument for path in (family["toys"], other, spaced) for argument in ("--model", path)]
    weights = ("--weight", "toys=0.5", "--weight", "toys-2=-2", "--weight", "spiel-zeug=0")
    arguments = ("--base", family["base"], *models, *weights, "--method", "task-arithmetic")
    shown = run(*arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == "warning: spiel-zeug has weight 0: its task vector is zero and counts as one\n"
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    found = {label: facts["weight"] for label, facts in record["models"].items()}
    assert found == {"toys": 0.5, "toys-2": -2, "spiel-zeug": 0}
    base, toys, second = (
        load_file(folder / "model.safetensors") for folder in (family["base"], family["toys"], other)
    )
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = base[name] + 0.3 * (0.5 * (toys[name] - base[name]) - 2 * (second[name] - base[name]))
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)


def test_no_arguments_show_the_help() -> None:
    shown = run()
    assert shown.exit_code == 2
    assert "--explain" in shown.output


def test_labels_come_from_folders(tmp_path: Path) -> None:
    paths = ["a/toys", "b/toys", "c/spiel zeug", "toys-2"]
    data = {"method": "ties", "model": [{"path": path} for path in paths]}
    found = make_recipe(data, where="x", folder=tmp_path, out=tmp_path / "out")
    assert [model.label for model in found.models] == ["toys", "toys-2", "spiel-zeug", "toys-2-2"]
    (tmp_path / "recipe.toml").write_text('method = "ties"\nout = "out"\nmodel = [{ path = "x" }]')
    assert read_recipe(tmp_path / "recipe.toml").models[0].path == tmp_path / "x"


def test_a_merge_imports_nothing_heavy(family: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom common.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    for method, options in (("task-arithmetic", []), ("ties", ["--option", "density=0.3"]), ("dare", [])):
        out = tmp_path / method
        arguments = ["--base", family["base"], "--model", family["beauty"], "--model", family["toys"]]
        command = [sys.executable, "-c", code, "merge", *map(str, arguments), "--method", method, *options]
        found = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=250)
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines()[-1] == "[]", method
        assert (out / "model.safetensors").exists()


def test_every_method_is_explained() -> None:
    shown = run("--explain", "all", "--format", "json")
    assert shown.exit_code == 0, shown.output
    found = {entry["name"]: entry for entry in json.loads(shown.stdout)}
    assert found.keys() >= {*methods(), "adamerging", "mergerec", "product", "knots"}
    assert all(entry["summary"] and entry["paper"] and entry["equation"] for entry in found.values())
    assert found["ties"]["options"] == {"density": 0.2, "lambda": 1.0}
    assert found["regmean"]["needs"] == "the catalog of every model"
    assert "keeps the one" in found["auto"]["summary"]
    assert "learned on pseudo-users" in found["mergerec"]["summary"]
    assert "CE(s, argmax t) + alpha T^2 KL" in found["mergerec"]["equation"]
    assert "H(softmax(s))" in found["adamerging"]["equation"]
    text = run("--explain", "ties").stdout
    assert "density = 0.2" in text
    assert "Yadav" in text
    wrong = run("--explain", "tees")
    assert wrong.exit_code == 2
    assert "did you mean 'ties'" in wrong.stderr


def test_options_are_the_same_with_and_without_pydantic() -> None:
    for name, method in methods().items():
        assert method.resolve({}) == method.options().model_dump(), name
    found = methods()["ties"].resolve({"lambda": 2})
    assert found == {"density": 0.2, "lambda": 2.0}
    assert isinstance(found["lambda"], float)


def test_it_is_a_command_of_isthmus() -> None:
    shown = CliRunner().invoke(isthmus.cli, ["merge", "--help"])
    assert shown.exit_code == 0
    assert "--explain" in shown.output


def catalogs(folder: Path, labels: tuple[str, ...]) -> dict[str, Path]:
    words = ["red", "blue", "green", "small", "large", "oak", "spoon", "lamp", "chair"]
    found = {}
    for shift, label in enumerate(labels):
        titles = [f"{words[(i + shift) % 9]} {words[(3 * i + 1) % 9]} {i}" for i in range(9)]
        found[label] = folder / f"{label}.parquet"
        Catalog(label, [f"{label}-{i}" for i in range(9)], {"title": titles}).write(found[label])
    return found


@pytest.fixture
def shops(make_pico: Any, tmp_path: Path) -> Tensors:
    """An encoder `base`, two models of it, and their catalogs; returns the base's tensors."""
    start = load_file(make_pico(tmp_path / "base") / "model.safetensors")
    for seed, label in enumerate(("garden", "toys"), start=1):
        make_pico(tmp_path / label)
        write_model(tmp_path / "weights", moved(start, seed))
        (tmp_path / "weights" / "model.safetensors").replace(tmp_path / label / "model.safetensors")
    return start


def shown_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that the card of a merged folder shows."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])


@pytest.mark.parametrize("method", ["mergerec", "regmean"])
def test_methods_that_need_catalogs(shops: Tensors, tmp_path: Path, method: str) -> None:
    start, files = shops, catalogs(tmp_path, ("garden", "toys"))
    models = "".join(
        f'[[model]]\npath = "{label}"\ncatalog = "{path.name}"\n' for label, path in files.items()
    )
    text = f'base = "base"\nmethod = "{method}"\nout = "out"\ndevice = "auto"\n'
    learning = '[learning]\nsteps = 2\nbatch_size = 4\nprecision = "fp32"\n' if method == "mergerec" else ""
    (tmp_path / "recipe.toml").write_text(text + learning + models)
    shown = run(tmp_path / "recipe.toml", "--format", "json")
    assert shown.exit_code == 0, shown.output
    record = json.loads(shown.stdout)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    layer, table = "encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"
    assert not np.array_equal(merged[layer], start[layer])
    if method == "mergerec":
        assert set(record["coefficients"]["layer-0"]) == {"garden", "toys"}
        assert np.array_equal(merged[table], start[table])
        assert any(table in warning and "left out" in warning for warning in record["warnings"])
        trajectory = (tmp_path / "out" / "trajectory.jsonl").read_text()
        steps = [json.loads(line) for line in trajectory.splitlines()]
        assert [step["step"] for step in steps] == [0, 1, 2]
        assert set(steps[2]["coefficients"]["layer-0"]) == {"garden", "toys"}
    else:
        assert not np.array_equal(merged[table], start[table])
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    again = {**shown_recipe(tmp_path / "out"), "out": "again"}
    assert again.get("learning", {}).get("steps") == (2 if method == "mergerec" else None)
    for entry, path in zip(again["model"], files.values(), strict=True):
        assert entry["catalog"] == path.name
        assert record["models"][entry["label"]]["catalog"]["sha256"] == sha256_file(path)
    merge_folders(make_recipe(again, where="card", folder=tmp_path))
    for name, values in load_file(tmp_path / "again" / "model.safetensors").items():
        assert np.array_equal(values, merged[name])
    bad = "[learning]\nstps = 2\n"
    (tmp_path / "recipe.toml").write_text(text.replace('"out"', '"other"') + bad + models)
    wrong = run(tmp_path / "recipe.toml")
    assert wrong.exit_code == 2
    assert "did you mean 'steps'" in wrong.stderr


@pytest.mark.parametrize("method", ["regmean", "adamerging"])
def test_a_base_in_shards_merges_with_catalogs_as_one_file_does(
    shops: Tensors, tmp_path: Path, method: str
) -> None:
    shutil.copytree(tmp_path / "base", tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    write_model(tmp_path / "weights", shops, shards=2)
    for path in (tmp_path / "weights").glob("model*"):
        path.replace(tmp_path / "shards" / path.name)
    (catalog,) = catalogs(tmp_path, ("garden",)).values()
    data = {
        "method": method,
        "model": [{"path": "garden", "catalog": catalog.name}],
        "learning": {"steps": 2, "precision": "fp32"},
    }
    for base in ("base", "shards"):
        merge_folders(make_recipe({**data, "base": base, "out": f"of-{base}"}, where="x", folder=tmp_path))
    whole = load_file(tmp_path / "of-base" / "model.safetensors")
    found: Tensors = {}
    for path in (tmp_path / "of-shards").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        assert np.array_equal(found[name], values), name


def test_modules_with_weights_of_their_own_are_refused_with_catalogs(shops: Tensors, tmp_path: Path) -> None:
    (catalog,) = catalogs(tmp_path, ("garden",)).values()
    for folder in (tmp_path / "base", tmp_path / "garden"):
        (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
        (folder / "2_Dense").mkdir()
        save_file({"w": np.zeros(1, np.float32)}, folder / "2_Dense" / "model.safetensors")
    arguments = ("--model", tmp_path / "garden", "--catalog", f"garden={catalog}", "--method", "regmean")
    shown = run("--base", tmp_path / "base", *arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert "base: has weights in 2_Dense/model.safetensors" in shown.stderr


def test_vectors_beyond_memory_are_refused_with_catalogs(
    shops: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "available_bytes", lambda: 1000)
    for method in ("regmean", "adamerging"):
        files = catalogs(tmp_path, ("garden",))
        arguments = ("--model", tmp_path / "garden", "--catalog", f"garden={files['garden']}")
        shown = run("--base", tmp_path / "base", *arguments, "--method", method, "--out", tmp_path / "out")
        assert shown.exit_code == 2
        assert f"method '{method}' holds 0.0 GB of 1 models at once" in shown.stderr


def test_equal_models_are_warned_of_with_catalogs_too(shops: Tensors, tmp_path: Path) -> None:
    (path,) = catalogs(tmp_path, ("garden",)).values()
    shutil.copytree(tmp_path / "garden", tmp_path / "copy")
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    arguments: list[object] = ["--base", tmp_path / "base", "--method", "regmean", "--out", tmp_path / "out"]
    for label in ("garden", "copy", "same"):
        arguments += ["--model", tmp_path / label, "--catalog", f"{label}={path}"]
    assert run(*arguments).stderr.splitlines() == [
        "warning: copy and garden have the same weights; they count twice",
        "warning: same equals the base: its task vector is zero and counts as one",
    ]


def test_auto_says_why_and_catalogs_may_be_csv(shops: Tensors, tmp_path: Path) -> None:
    files = catalogs(tmp_path, ("garden", "toys"))
    labels = [a for label in files for a in ("--model", tmp_path / label)]
    for label, path in files.items():
        rows = zip(Catalog.read(path).item_ids, Catalog.read(path).attributes["title"], strict=True)
        text = "item_id,title\n" + "".join(f'{item},"{title}"\n' for item, title in rows)
        files[label] = path.with_suffix(".csv")
        files[label].write_text(text)
    catalog = [a for label, path in files.items() for a in ("--catalog", f"{label}={path}")]
    options = ("--option", "candidates=weight-averaging, ties density=0.5", "--out", tmp_path / "out")
    shown = run("--base", tmp_path / "base", *labels, *catalog, "--method", "auto", *options)
    assert shown.exit_code == 0, shown.output
    facts = json.loads((tmp_path / "out" / "merge.json").read_text())["facts"]
    assert shown.stdout.startswith(f"chose {facts['chosen']}: {facts['why']}\n")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Chosen: {facts['chosen']}, {facts['why']}" in card
    assert "| candidate | average | garden | toys | allowed |" in card
    assert f"| ties density=0.5 | {facts['scores']['ties density=0.5']['average']:.4f} |" in card


def test_adapters_merge_as_adapters(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "base_model_name_or_path": "b",
    }
    prefix = "base_model.model.encoder.layer.0.query"
    shapes = {f"{prefix}.lora_A.weight": (2, 5), f"{prefix}.lora_B.weight": (3, 2)}
    for seed, label in enumerate(("one", "two")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "adapter_config.json").write_text(json.dumps(config))
        save_file(random_tensors(seed, shapes), tmp_path / label / "adapter_model.safetensors")
    arguments = ("--model", tmp_path / "one", "--model", tmp_path / "two", "--method", "product")
    shown = run(*arguments, "--weight", "two=0.5", "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = merged[f"{prefix}.lora_B.weight"] @ merged[f"{prefix}.lora_A.weight"]
    wanted = sum(
        weight * 2 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        for weight, tensors in ((1.0, random_tensors(0, shapes)), (0.5, random_tensors(1, shapes)))
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 10_000_000
    again = shown_recipe(tmp_path / "out")
    assert again["method"] == "product"
    assert [(entry["path"], entry["weight"]) for entry in again["model"]] == [("one", 1.0), ("two", 0.5)]
    merge_folders(make_recipe({**again, "out": "again"}, where="card", folder=tmp_path))
    assert sha256_file(tmp_path / "again" / "adapter_model.safetensors") == record["weights_sha256"]
    alone = run("--model", tmp_path / "one", "--method", "product", "--out", tmp_path / "alone")
    assert alone.stderr == "warning: one adapter only; the rule is applied to it alone\n"
    scaling = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    np.testing.assert_allclose(found * scaling["lora_alpha"] / scaling["r"], wanted, rtol=1e-4, atol=1e-5)
    assert run(*arguments, "--out", tmp_path / "out").exit_code == 2  # it exists
