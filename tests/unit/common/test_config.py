"""Configuration: one TOML file, unknown keys refused with the nearest known one."""

from pathlib import Path

import pytest

from common.config import LearningSection, MergeMethod, RunConfig, load_toml, validate
from common.errors import ConfigError
from simulations.config import SimulationConfig


def wrong(text: str, folder: Path, model: type = RunConfig) -> ConfigError:
    path = folder / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_toml(path, model)
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("publsh = 'x'", "publsh", "publish"),
        ("[trainning]\nmax_steps = 1", "trainning", "training"),
        ("[training]\nlerning_rate = 1.0", "training.lerning_rate", "learning_rate"),
        ("[[merge]]\nmethod = 'ties'\n[[merge]]\nmetod = 'ties'", "merge.1.metod", "method"),
        ("[[merge]]\nmethod = 'mergerec'\nlearning = {stepz = 1}", "merge.0.learning.stepz", "steps"),
        ("[[domain]]\nname = 'a'\npath = 'x'\nuser = 3", "domain.0.user", "users"),
        ("[simulation]\nthread_per_domain = 1", "simulation.thread_per_domain", "threads_per_domain"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    error = wrong(text, tmp_path, SimulationConfig)
    assert repr(key) in error.message
    assert error.next_step == f"did you mean {nearest!r}?"


def test_an_unknown_key_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    error = wrong("[base]\nzzzzzz = 1", tmp_path)
    assert error.next_step == "known keys here: model, pooling"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run]\nname = 'Not A Name'", "run.name"),
        ("[training]\nbatch_size = 'many'", "training.batch_size"),
        ("[evaluation]\nk = 0", "evaluation.k"),
        ("publish = 'nothing'", "names no"),
        ("[[merge]]\nmethod = 'ties'\n[[merge]]\nmethod = 'ties'", "two [[merge]] entries"),
        ("[run\n", "not valid TOML"),
        ("[[merge]]\nmethod = 'ties'\noptions = {k = [1]}", "merge.0.options.k"),
    ],
)
def test_a_wrong_value_says_where(tmp_path: Path, text: str, says: str) -> None:
    error = wrong(text, tmp_path)
    assert says in error.message
    assert error.next_step


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_toml(tmp_path / "none.toml", RunConfig)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(tmp_path / "bytes.toml", RunConfig)


def test_what_was_resolved_reads_back_as_the_same() -> None:
    data = {
        "run": {"name": "x", "quorum": 2},
        "learning": {"preset": "reference", "steps": 7},
        "merge": [{"method": "mergerec", "options": {"granularity": "layer"}, "learning": {"steps": 3}}],
    }
    config = validate(data, RunConfig, where="here")
    assert validate(config.model_dump(mode="json"), RunConfig, where="here") == config


def test_the_reference_preset_fills_what_is_not_given() -> None:
    section = LearningSection.model_validate({"preset": "reference", "steps": 7})
    assert (section.steps, section.item_embeddings, section.mask_seen) == (7, "stale", False)
    assert LearningSection().item_embeddings == "refreshed"


def test_labels() -> None:
    assert MergeMethod(method="ties").label == "ties"
    assert MergeMethod(method="mergerec", options={"granularity": "layer"}).label == "mergerec-layer"
    assert MergeMethod(method="mergerec", name="mine", options={"granularity": "layer"}).label == "mine"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().publish = "ties"


def test_what_is_published_is_resolved() -> None:
    assert RunConfig().publish == "confluence"
    both = validate({"merge": [{"method": "task-arithmetic"}, {"method": "ties"}]}, RunConfig, where="here")
    assert both.publish == "task-arithmetic"
    only = validate({"merge": [{"method": "ties"}]}, RunConfig, where="here")
    assert only.publish == "ties"
    with pytest.raises(ConfigError, match="at least one method"):
        validate({"merge": []}, RunConfig, where="here")
