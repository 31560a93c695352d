"""What to merge: a recipe, from a TOML file or from command-line flags.

Plain dataclasses and checks by hand: the start of a small merge is most of its time. The sections of learned
methods, `[learning]` and `[text]`, are those of a run's configuration (`common.config`) and checked there.

    base = "all-MiniLM-L6-v2"        # a folder, relative to this file, or "embedded"
    method = "ties"
    out = "merged"
    options = { density = 0.3 }
    [[model]]
    path = "beauty"
    [[model]]
    path = "toys"
    weight = 0.5
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError, suggest

Options = dict[str, float | int | str | bool]

EMBEDDED = "embedded"
DTYPES = ("base", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
LARGEST_WEIGHT = 1e6  # of a model or an adapter, whatever its sign
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_KEYS: dict[str, type | tuple[type, ...]] = {
    "base": str, "method": str, "out": str, "dtype": str, "device": str, "seed": int,
    "options": dict, "model": list, "learning": dict, "text": dict,
}  # fmt: skip
_MODEL_KEYS: dict[str, type | tuple[type, ...]] = {
    "path": str, "label": str, "catalog": str, "weight": (float, int),
}  # fmt: skip


@dataclass(frozen=True)
class ModelEntry:
    """One model: its folder, what it is called, its items' catalog, and a factor on its task vector."""

    path: Path
    label: str
    catalog: Path | None = None
    weight: float | None = None  # None: 1, or what a rule for adapters takes


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; paths are absolute. `base` is None only for adapters that name their own."""

    models: tuple[ModelEntry, ...]
    method: str
    out: Path
    base: Path | None = None
    options: Options = field(default_factory=dict)
    dtype: str = "base"
    device: str = "auto"
    seed: int = 0
    learning: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)


def read_recipe(path: Path, out: Path | None = None) -> Recipe:
    """The recipe in the TOML file `path`; `out` replaces its own.

    Raises ConfigError naming the file, the key and the nearest known key.
    """
    import tomllib

    try:
        data = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe", next_step="check the path") from None
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}", next_step="check the path") from None
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: not valid TOML: {err}", next_step="mend that line") from None
    return make_recipe(data, where=str(path), folder=path.resolve().parent, out=out)


def make_recipe(data: Mapping[str, Any], *, where: str, folder: Path, out: Path | None = None) -> Recipe:
    """Check `data`, as a recipe file has it; relative paths start in `folder`. Raises ConfigError."""
    _check_keys(data, _KEYS, where, "")
    if out is None and "out" not in data:
        raise ConfigError(f"{where}: no output folder", next_step="give `out` (or --out)")
    if "method" not in data:
        raise ConfigError(f"{where}: no method", next_step="give `method`; `--explain all` lists them")
    _check_choice(where, "dtype", data.get("dtype", "base"), DTYPES)
    _check_choice(where, "device", data.get("device", "auto"), DEVICES)
    if data.get("seed", 0) < 0:
        raise ConfigError(f"{where}: seed: must not be negative", next_step="mend the value")
    options = data.get("options", {})
    for key, value in options.items():
        if not isinstance(value, (float, int, str, bool)):
            raise ConfigError(f"{where}: options.{key}: must be a number, a text or true/false")
    return Recipe(
        models=_models(data.get("model", []), where, folder),
        method=data["method"],
        out=out.absolute() if out is not None else absolute(folder, data["out"]),
        base=_base(folder, data["base"]) if "base" in data else None,
        options=dict(options),
        dtype=data.get("dtype", "base"),
        device=data.get("device", "auto"),
        seed=data.get("seed", 0),
        learning=data.get("learning", {}),
        text=data.get("text", {}),
    )


def unknown_key(where: str, key: str, known: Collection[str]) -> ConfigError:
    """The error for a key that nobody knows, with the nearest known one."""
    hint = suggest(key.rpartition(".")[2], known, otherwise="known keys here: {}")
    return ConfigError(f"{where}: unknown key {key!r}", next_step=hint)


def _models(entries: Sequence[Any], where: str, folder: Path) -> tuple[ModelEntry, ...]:
    if not entries:
        raise ConfigError(f"{where}: no models", next_step="give a [[model]] (or --model) for each")
    models: list[ModelEntry] = []
    for number, entry in enumerate(entries, start=1):
        place = f"model.{number}."
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: {place[:-1]}: must be a table with a path")
        _check_keys(entry, _MODEL_KEYS, where, place)
        if "path" not in entry:
            raise ConfigError(f"{where}: {place}path: is missing", next_step="name the model's folder")
        path = absolute(folder, entry["path"])
        taken = [model.label for model in models]
        label = entry["label"] if "label" in entry else free_label(path, taken)
        if not LABEL.fullmatch(label) or label in taken:
            why = "is taken by another model" if label in taken else "must be letters, digits, '.', '_', '-'"
            raise ConfigError(f"{where}: {place}label: {label!r} {why}", next_step="choose another label")
        weight = float(entry["weight"]) if "weight" in entry else None
        if weight is not None and not abs(weight) <= LARGEST_WEIGHT:  # NaN is not, either
            raise ConfigError(
                f"{where}: {place}weight: {weight:g} is out of range",
                next_step=f"give a number between {-LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}",
            )
        catalog = absolute(folder, entry["catalog"]) if "catalog" in entry else None
        models.append(ModelEntry(path, label, catalog, weight))
    return tuple(models)


def free_label(path: Path, taken: Collection[str]) -> str:
    """The folder's name, with a number where another model has it already."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name).lstrip("._-")[:56] or "model"
    numbers = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(label for label in numbers if label not in taken)


def _check_keys(
    data: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]], where: str, place: str
) -> None:
    for key, value in data.items():
        if key not in known:
            raise unknown_key(where, place + key, known)
        kinds = known[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            names = {str: "text", int: "a whole number", dict: "a table", list: "a list of tables"}
            wanted = "a number" if isinstance(kinds, tuple) else names[kinds]
            raise ConfigError(f"{where}: {place}{key}: must be {wanted}", next_step="mend the value")


def _check_choice(where: str, key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{where}: {key}: {value!r} is not allowed", next_step=f"use one of {', '.join(allowed)}"
        )


def absolute(folder: Path, text: str) -> Path:
    """The path that `text` means in a recipe of that folder."""
    return (folder / Path(text).expanduser()).absolute()


def _base(folder: Path, text: str) -> Path:
    if text != EMBEDDED:
        return absolute(folder, text)
    from common.models.base import resolve_base

    return resolve_base(text)
