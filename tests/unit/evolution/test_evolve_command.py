"""`isthmus evolve`, the file of samples, and `evo-merging` as a merge method of a run."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from common.catalog import Catalog
from common.config import InstructionSection, LoraSection, RunConfig
from common.errors import ConfigError, DataError
from common.files import sha256_file
from common.language.adapters import adapter_tensors, check_adapter, load_adapter, save_adapter
from common.language.samples import read_samples
from common.progress import NO_REPORT
from server.evolution.cli import evolve
from server.language.registry import METHODS, AdapterInputs
from tests.unit.language.conftest import build_causal

LORA = LoraSection(rank=2, alpha=4.0, dropout=0.0, modules=("q_proj", "v_proj"))
LINES = [{"prompt": "tea\n", "answer": "cup"}, {"prompt": "boat\n", "answer": "train"}]
QUICK = {"ratio_iterations": 1, "scale_iterations": 1, "population": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_causal(tmp_path_factory.mktemp("causal") / "base")


@pytest.fixture(scope="module")
def adapters(base):
    generator = torch.Generator().manual_seed(0)
    table = adapter_tensors(base, LORA)
    return {
        label: {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in table.items()}
        for label in ("tea", "toys")
    }


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def command(base, samples, out, *more):
    arguments = ["--base", base, "--samples", samples, "--out", out, *more]
    for key, value in QUICK.items():
        arguments += ["--option", f"{key}={value}"]
    return CliRunner().invoke(evolve, [str(argument) for argument in arguments])


def test_the_command_leaves_an_adapter_and_a_table(base, adapters, samples, tmp_path):
    for label, adapter in adapters.items():
        save_adapter(base, LORA, adapter, tmp_path / "pool" / label, "")
    more = ("--adapters", tmp_path / "pool", "--test", samples, "--method", "base", "--method", "evo-merging")
    found = command(base, samples, tmp_path / "out", *more)
    assert found.exit_code == 0, found.output
    rows = [line for line in found.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == "| method | loss | test_loss | evaluations | seconds |"
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["base", "evo-merging"]
    assert rows[3].split("|")[4].strip() == "10"
    lora, adapter = load_adapter(tmp_path / "out" / "evo-merging" / "adapter")
    assert lora.rank == LORA.rank
    check_adapter(adapter, adapter_tensors(base, LORA))
    again = command(base, samples, tmp_path / "out", *more, "--format", "json")
    assert [row["method"] for row in json.loads(again.stdout)] == ["base", "evo-merging"]


def test_the_command_says_that_the_penalty_decided(base, adapters, samples, tmp_path):
    for label, adapter in adapters.items():
        save_adapter(base, LORA, adapter, tmp_path / "pool" / label, "")
    more = ("--adapters", tmp_path / "pool", "--method", "evo-merging", "--option", "scale_penalty=9")
    found = command(base, samples, tmp_path / "out", *more)
    assert found.exit_code == 0, found.output
    assert "evo-merging: the penalty outweighs" in found.stderr


def test_the_command_refuses_what_cannot_be(base, adapters, samples, tmp_path):
    save_adapter(base, LORA, adapters["tea"], tmp_path / "tea", "")
    other = LORA.model_copy(update={"alpha": 8.0})
    save_adapter(base, other, adapters["toys"], tmp_path / "toys", "")
    for more, said in (
        ((), "no adapters to merge"),
        (("--adapter", tmp_path / "tea", "--adapter", f"tea={tmp_path / 'toys'}"), "two adapters are called"),
        (("--adapter", tmp_path / "tea", "--adapter", tmp_path / "toys"), "rank 2 and alpha 8"),
        (("--adapter", tmp_path / "tea", "--option", "popultion=3"), "did you mean 'population'"),
    ):
        found = command(base, samples, tmp_path / "out", *more)
        assert found.exit_code != 0
        assert said in found.output
    other = build_causal(tmp_path / "other", seed=1)
    save_adapter(base, LORA, adapters["tea"], tmp_path / "tea", "", base_name=str(other))
    found = command(base, samples, tmp_path / "out", "--adapter", tmp_path / "tea")
    assert found.exit_code != 0
    assert "which is another model than" in found.output


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2: expected"),
        ("[]\n", "line 1: expected"),
        ("{", "line 1: expected"),
        ('{"prompt": "a", "answer": " "}\n', "line 1: prompt or answer is empty"),
        ("\n", "no samples"),
        ('{"prompt": "a", "answer": "b", "others": "c"}', "line 1: `others` is not a list of texts"),
        ('{"prompt": "a", "answer": "b", "others": ["c", " "]}', "line 1: `others` is not a list of texts"),
        ('{"prompt": "a", "answer": "b", "others": ["c", "b"]}', "line 1: an answer occurs twice"),
        (
            '{"prompt": "a", "answer": "b", "others": ["c"]}\n{"prompt": "a", "answer": "b"}',
            "jsonl: 1 of 2 samples have other answers",
        ),
    ],
)
def test_samples_that_are_none(tmp_path, text, said):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_samples(path)
    with pytest.raises(DataError, match="not a readable"):
        read_samples(tmp_path / "absent")


def catalog(domain):
    titles = [f"{domain} {word}" for word in ("cup", "pot", "lamp", "table", "train", "boat")]
    titles.append(f"{domain} {'7 ' * 480}")  # cut in prompts
    return Catalog(domain, [f"{n}" for n in range(len(titles))], {"title": titles})


def merge(base, adapters, work, catalogs=("tea", "toys"), **options):
    method = METHODS["evo-merging"]
    config = RunConfig(instruction=InstructionSection(candidates=3), lora=LORA, base={"model": str(base)})
    inputs = AdapterInputs(
        Path(base), LORA, adapters, {name: catalog(name) for name in catalogs}, config, work, NO_REPORT
    )
    return method(inputs, method.check({**QUICK, "prompts": 4, "history_items": 2, **options}))


@pytest.mark.parametrize("fitness", ["agreement", "entropy", "scoring"])
def test_a_run_merges_by_what_the_server_can_score(base, adapters, samples, tmp_path, fitness):
    options = {"samples": str(samples)} if fitness == "scoring" else {}
    found = merge(base, adapters, tmp_path, fitness=fitness, **options)
    check_adapter(found.adapter, adapter_tensors(base, LORA))
    assert found.facts["fitness"] == fitness
    assert found.facts["evaluations"] == 10
    assert set(found.coefficients) == {"ratios", "scales"}
    assert set(found.coefficients["scales"]) == {"tea", "toys"}
    record = (tmp_path / "evolution.jsonl").read_bytes()
    again = merge(base, adapters, tmp_path, fitness=fitness, **options)
    assert again.coefficients == found.coefficients
    assert (tmp_path / "evolution.jsonl").read_bytes() == record  # nothing was scored again


def test_a_run_refuses_options_and_inputs_that_do_not_go(base, adapters, samples, tmp_path):
    check = METHODS["evo-merging"].check
    for options in ({"fitness": "scoring"}, {"samples": str(samples)}):
        with pytest.raises(ConfigError, match="go together"):
            check(options)
    with pytest.raises(ConfigError, match="not a readable"):
        check({"fitness": "scoring", "samples": str(tmp_path / "absent")})
    with pytest.raises(DataError, match="'toys' has a task vector but no catalog"):
        merge(base, adapters, tmp_path, catalogs=("tea",))


def test_samples_are_those_that_the_run_was_created_with(samples, monkeypatch):
    check = METHODS["evo-merging"].check
    monkeypatch.chdir(samples.parent)
    options = check({"fitness": "scoring", "samples": samples.name})
    assert options["samples"] == str(samples)
    assert options["samples_sha256"] == sha256_file(samples)
    assert check(options) == options
    samples.write_text(samples.read_text() + json.dumps(LINES[0]) + "\n")
    with pytest.raises(ConfigError, match="changed since the run was created"):
        check(options)
