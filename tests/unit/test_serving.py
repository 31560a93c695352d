"""Installing, rolling back, recommending."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.serving as serving
from clients.serving import current, install, own_model, recommend, rollback, set_own_model
from common.errors import BaseMismatchError, DataError, ModelError
from common.models.base import load_tensors, model_digest, save_model, trainable_tensors


@pytest.fixture
def published(pico_model: Path, tmp_path: Path) -> list[Path]:
    """Three universal models."""
    folders = []
    for index in range(3):
        tensors = load_tensors(pico_model, trainable_tensors(pico_model))
        moved = {name: tensor + 0.05 * (index + 1) for name, tensor in tensors.items()}
        folders.append(tmp_path / f"published-{index}")
        save_model(pico_model, moved, folders[-1], readme=f"card {index}")
    return folders


def test_install_rollback_and_what_is_kept(published: list[Path], pico_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert current(home) is None
    with pytest.raises(ModelError, match="no previous"):
        rollback(home)
    installed = [install(home, folder, pico_model, model_digest(folder)) for folder in published]
    assert current(home) == installed[2] and installed[2].name == model_digest(published[2])
    assert sorted(path.name for path in (home / "models/universal").iterdir()) == sorted(
        folder.name for folder in installed[1:]
    )
    assert rollback(home) == installed[1] == current(home)
    assert rollback(home) == installed[2] == current(home)
    assert (installed[2] / "README.md").read_text() == "card 2"


def test_installing_again_changes_nothing_and_mends_damage(
    published: list[Path], pico_model: Path, tmp_path: Path
) -> None:
    home, digest = tmp_path / "home", model_digest(published[0])
    folder = install(home, published[0], pico_model, digest)
    assert install(home, published[0], pico_model, digest) == folder
    with pytest.raises(ModelError, match="no previous"):
        rollback(home)
    (folder / "config.json").write_text("{}")
    assert install(home, published[0], pico_model, digest) == folder
    assert model_digest(folder) == digest


def test_tensors_install_like_the_folder_they_came_from(
    published: list[Path], pico_model: Path, tmp_path: Path
) -> None:
    tensors = load_tensors(published[1], trainable_tensors(pico_model))
    digest = model_digest(published[1])
    assert install(tmp_path / "home", tensors, pico_model, digest).name == digest


def test_another_digest_is_refused_and_changes_nothing(
    published: list[Path], pico_model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    before = install(home, published[0], pico_model)
    with pytest.raises(BaseMismatchError, match="announced"):
        install(home, published[1], pico_model, "0" * 64)
    assert current(home) == before
    assert [path.name for path in (home / "models/universal").iterdir()] == [before.name]


@pytest.mark.parametrize("moment", ["copytree", "folder_digest", "_link"])
def test_a_kill_while_installing_leaves_a_whole_model(
    published: list[Path], pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    home = tmp_path / "home"
    before = install(home, published[0], pico_model)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = shutil if moment == "copytree" else serving
    with monkeypatch.context() as patch:
        patch.setattr(target, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            install(home, published[1], pico_model)
    assert current(home) == before and model_digest(before) == before.name
    after = install(home, published[1], pico_model)
    assert current(home) == after and rollback(home) == before


def test_own_model(pico_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no fine-tuned model"):
        own_model(tmp_path)
    set_own_model(tmp_path, pico_model)
    assert own_model(tmp_path).resolve() == pico_model.resolve()


def test_recommendations_are_the_nearest_unseen_items(
    pico_model: Path, pico_domain: Any, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    found = recommend(pico_model, pico_domain, ["i003", "i010"], k=5)
    assert len(found) == 5 and not {"i003", "i010"} & {item for item, _, _ in found}
    scores = [score for _, _, score in found]
    assert scores == sorted(scores, reverse=True)
    titles = dict(zip(pico_domain.item_ids, pico_domain.attributes["title"], strict=True))
    assert all(title == titles[item] for item, title, _ in found)
    assert len(recommend(pico_model, pico_domain, ["i003"], k=100)) == 29
    assert recommend(pico_model, pico_domain, ["i003"], k=30, include_seen=True)[0][0] == "i003"
    assert recommend(pico_model, pico_domain, ["i003", "i010"], k=5) != recommend(
        pico_model, pico_domain, ["i010", "i003"], k=5
    )


def test_cached_embeddings_give_the_same_and_are_per_model_and_catalog(
    pico_model: Path,
    pico_sentence_model: Path,
    pico_domain: Any,
    make_domain: Callable[..., Any],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    plain = recommend(pico_model, pico_domain, ["i003"], k=5)
    for _ in range(2):
        found = recommend(pico_model, pico_domain, ["i003"], k=5, cache=cache)
        assert [item for item, _, _ in found] == [item for item, _, _ in plain]
    recommend(pico_sentence_model, pico_domain, ["i003"], k=5, cache=cache)
    recommend(pico_model, make_domain(seed=3), ["i003"], k=5, cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_an_unknown_item_is_named_with_the_nearest(pico_model: Path, pico_domain: Any) -> None:
    with pytest.raises(DataError, match="'i0033'") as caught:
        recommend(pico_model, pico_domain, ["i0033"])
    assert "'i003'" in caught.value.next_step or "'i033'" in caught.value.next_step
    with pytest.raises(DataError, match="empty"):
        recommend(pico_model, pico_domain, [])
