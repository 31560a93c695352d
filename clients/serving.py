"""The models that an owner has installed, and recommendations from them.

    models/universal/<digest>/   universal models, each a folder that loads without us
    models/current               the one in use: a symbolic link, switched by one rename
    models/previous              the one before, for `rollback`
    models/own                   this domain's own fine-tuned model (a link into its work folder)
    models/personal/             between the two, where the owner asked for it (`clients.personal`)

Each holds `run.json` beside the model: the configuration of its run, for the text settings. A universal one
also holds `comparison.json`: how it and the domain's own model do on the domain's test users.
A model is named by its digest (`common.language.adapters.folder_digest`), computed from what was written;
it appears complete or not at all, and a model whose digest is not the announced one is not installed.
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import RunConfig, TextSection, validate
from common.errors import BaseMismatchError, ConfigError, DataError, ModelError
from common.files import fsync_folder, sha256_bytes, storage_errors, write_atomic
from common.language.adapters import folder_digest
from common.models.base import save_model

if TYPE_CHECKING:
    from torch import Tensor

    from clients.data.domain import Domain
    from common.models.encoder import Encoder, ItemTokens

Recommendation = tuple[str, str, float]
SETTINGS, COMPARISON = "run.json", "comparison.json"
UNIVERSAL, OWN = "universal", "own"
_README = "# Universal model\n\nInstalled by Isthmus.\n"


def install(
    home: Path,
    source: Path | Mapping[str, Tensor],
    base_folder: Path,
    digest: str | None = None,
    *,
    readme: str | None = None,
    config: RunConfig | None = None,
) -> Path:
    """Install a universal model, given as a model folder or as tensors to put into the base.

    `config` is that of the run which made it.

    Verifies that what was written has `digest` (None: whatever it has), switches `current` to it and
    keeps the one before. Returns the installed folder; installing the current one again changes
    nothing. Raises BaseMismatchError, VectorError, StorageError; whatever fails leaves `current` as it was.
    """
    models = _models(home)
    if (
        digest
        and current(home) == models / "universal" / digest
        and folder_digest(current_or_fail(home)) == digest
    ):
        write_settings(models / "universal" / digest, config)
        return models / "universal" / digest
    staging = models / "universal" / f".staging-{secrets.token_hex(6)}"
    with storage_errors(staging):
        try:
            if isinstance(source, Path):
                shutil.copytree(source, staging)
            else:
                save_model(base_folder, source, staging, readme=readme or _README)
            got = folder_digest(staging)
            if digest is not None and got != digest:
                raise BaseMismatchError(
                    f"the universal model has digest {got[:16]}, announced was {digest[:16]}",
                    next_step="use the run's base model and fetch the parcel again",
                )
            target = models / "universal" / got
            if target.exists() and folder_digest(target) != got:
                shutil.rmtree(target)  # damaged since; the staged one was verified
            if not target.exists():
                staging.replace(target)
            write_settings(target, config)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        before = current(home)
        if before is not None and before != target:
            _link(models / "previous", before)
        _link(models / "current", target)
        _prune(home)
    return target


def rollback(home: Path) -> Path:
    """Make the previous universal model the current one (and the other way round). Returns its folder.

    Raises ModelError where there is none.
    """
    models, now, before = _models(home), current(home), previous(home)
    if before is None or before == now:
        raise ModelError("there is no previous universal model", next_step="install one first")
    _link(models / "current", before)
    if now is not None:
        _link(models / "previous", now)
    return before


def current(home: Path) -> Path | None:
    """The folder of the universal model in use, or None."""
    return _target(_models(home) / "current")


def previous(home: Path) -> Path | None:
    """The folder of the universal model before the one in use, or None."""
    return _target(_models(home) / "previous")


def current_or_fail(home: Path) -> Path:
    """The folder of the universal model in use. Raises ModelError where none is installed."""
    folder = current(home)
    if folder is None:
        raise ModelError(
            "no universal model is installed", next_step="take part in a run, or wait for its end"
        )
    return folder


def set_own_model(home: Path, model_folder: Path, config: RunConfig | None = None) -> None:
    """Remember where this domain's own fine-tuned model is; `config` is that of the run."""
    write_settings(model_folder, config)
    _link(_models(home) / "own", model_folder.resolve())


def own_model(home: Path) -> Path:
    """This domain's own fine-tuned model. Raises ModelError where it has none."""
    folder = _target(_models(home) / "own")
    if folder is None:
        raise ModelError("this domain has no fine-tuned model yet", next_step="take part in a run first")
    return folder


def write_settings(model_folder: Path, config: RunConfig | None) -> None:
    """Keep the configuration of the run that a model comes from beside it (None: leave what is there)."""
    if config is not None:
        content = json.dumps(config.model_dump(mode="json"), indent=1) + "\n"
        write_atomic(model_folder / SETTINGS, content.encode())


def settings_of(model_folder: Path) -> RunConfig:
    """The configuration of the run that a model comes from; the defaults where none was kept.

    Raises ConfigError where the file is damaged.
    """
    path = model_folder / SETTINGS
    if not path.is_file():
        return RunConfig()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{path}: not readable as JSON", next_step="install the model again") from None
    return validate(data, RunConfig, where=str(path))


def comparison(model_folder: Path) -> dict[str, dict[str, float]] | None:
    """`{"universal": metrics, "own": metrics}` on the test users, as it was when the model came; or None."""
    path = model_folder / COMPARISON
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def recommend(
    model_folder: Path,
    domain: Domain,
    history_item_ids: Sequence[str],
    k: int = 10,
    *,
    text: TextSection | None = None,
    include_seen: bool = False,
    cache: Path | None = None,
    candidates: Sequence[str] | None = None,
) -> list[Recommendation]:
    """The `k` best next items after a history (item ids, **oldest first**): `(item id, title, score)`.

    `text` None takes the settings of the model's run. Scores are cosines, or of a language model mean
    log-likelihoods; items of the history are left out unless `include_seen` or named by `candidates`, which
    (item ids) are then all that is ranked. `cache` is a folder where item embeddings are kept, by model and
    catalog. Raises DataError naming an unknown item and the nearest known one, ModelError, and of a language
    model ConfigError for a `k` that is too large.
    """
    chosen = None if candidates is None else _indices(domain, candidates)
    if settings_of(model_folder).instruction is not None:
        return _recommend_by_language(model_folder, domain, history_item_ids, k, chosen, include_seen)
    import torch

    from clients.training.adapters import load_adapted
    from clients.training.dataset import domain_tokens, recent_first

    text = text or settings_of(model_folder).text
    history = _indices(domain, history_item_ids)
    encoder = load_adapted(model_folder, precision="auto")
    tokens = domain_tokens(encoder, domain, text)
    item_IE = _item_embeddings(encoder, tokens, model_folder, cache)
    ids = tokens.history(
        recent_first(torch.tensor(history).numpy(), text.max_history_items), text.max_seq_len
    )
    score_I = item_IE @ encoder.encode([ids])[0]
    if chosen is not None:
        others = torch.ones(len(score_I), dtype=torch.bool)
        others[chosen] = False
        score_I[others] = -torch.inf
    elif not include_seen:
        score_I[history] = -torch.inf
    best = torch.argsort(score_I, descending=True, stable=True)[:k]
    titles = domain.attributes.get("title") or tokens.texts
    return [
        (domain.item_ids[int(index)], titles[int(index)] or tokens.texts[int(index)], float(score_I[index]))
        for index in best
        if score_I[index] > -torch.inf
    ]


def _recommend_by_language(
    model_folder: Path,
    domain: Domain,
    history_item_ids: Sequence[str],
    k: int,
    candidates: Sequence[int] | None,
    include_seen: bool,
) -> list[Recommendation]:
    from clients.language import rank_titles

    history = _indices(domain, history_item_ids)
    ranked = rank_titles(model_folder, domain, history, k, candidates=candidates, include_seen=include_seen)
    titles = domain.attributes["title"]
    return [(domain.item_ids[item], titles[item], score) for item, score in ranked]


def left_out(model_folder: Path, domain: Domain) -> Counter[str]:
    """How many items of the catalog a model never recommends, by reason: a language model ranks titles."""
    section = settings_of(model_folder).instruction
    if section is None:
        return Counter()
    from clients.language import shown_titles, unrankable

    titles = shown_titles(domain, section.title_words)
    return Counter(unrankable(titles, range(len(titles))).values())


def why(model_folder: Path, domain: Domain, history_item_ids: Sequence[str], item_id: str) -> str:
    """What an installed language model generates when asked why it recommends an item.

    Raises ConfigError for another kind of model, DataError for an unknown item.
    """
    if settings_of(model_folder).instruction is None:
        raise ConfigError(
            "this model embeds texts and generates none, so it cannot say why",
            next_step="leave --explain out, or take part in a run with a language model",
        )
    from clients.language import explain

    (item,) = _indices(domain, [item_id])
    return explain(model_folder, domain, _indices(domain, history_item_ids), item)


def _indices(domain: Domain, item_ids: Sequence[str]) -> list[int]:
    if not item_ids:
        raise DataError("the history is empty", next_step="name at least one item: --history ITEM,ITEM")
    index_of = {item_id: index for index, item_id in enumerate(domain.item_ids)}
    for item_id in item_ids:
        if item_id not in index_of:
            near = difflib.get_close_matches(item_id, domain.item_ids, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "see items.parquet of the domain"
            raise DataError(f"unknown item {item_id!r} in domain {domain.name!r}", next_step=hint)
    return [index_of[item_id] for item_id in item_ids]


def _item_embeddings(encoder: Encoder, tokens: ItemTokens, model_folder: Path, cache: Path | None) -> Tensor:
    from safetensors.torch import load_file

    from common.vectors import save_tensors

    if cache is None:
        return encoder.encode(tokens.items())
    texts = sha256_bytes("\x1e".join(tokens.texts).encode())
    path = cache / f"{folder_digest(model_folder)[:16]}-{texts[:16]}.safetensors"
    if path.is_file():
        known: Tensor = load_file(path)["item_IE"]
        return known
    item_IE = encoder.encode(tokens.items())
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    save_tensors(temporary, {"item_IE": item_IE})
    temporary.replace(path)
    return item_IE


def _models(home: Path) -> Path:
    return home.resolve() / "models"


def _target(link: Path) -> Path | None:
    if not link.is_symlink():
        return None
    target = link.parent / link.readlink()
    return target if target.is_dir() else None


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target` by one rename."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(6)}")
    inside = target.is_relative_to(link.parent)
    temporary.symlink_to(os.path.relpath(target, link.parent) if inside else target)
    temporary.replace(link)
    fsync_folder(link.parent)


def _prune(home: Path) -> None:
    """Remove universal models that are neither current nor previous, and what a kill left behind."""
    models = _models(home)
    kept = {_target(models / "current"), _target(models / "previous")}
    for folder in (models / "universal").iterdir():
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
