"""`merge_adapters`: from adapter folders to one adapter folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, VectorError, suggest
from common.language.peft_folder import AdapterFolder, read_adapter
from common.low_rank import LowRank
from common.models.base import WEIGHTS, model_digest
from common.progress import NO_REPORT, Report
from server.adapters._base import check_base
from server.adapters._write import base_name, check_out, write_adapter
from server.adapters.rules import AdapterMethod, all_layers, find, resolve
from server.engine.recipe import LARGEST_WEIGHT

SCHEMA_VERSION = 1
Weights = Mapping[str, float] | Sequence[float] | None


def merge_adapters(
    adapters: Mapping[str, Path],
    *,
    method: str = "product",
    options: Mapping[str, Any] | None = None,
    weights: Weights = None,
    out: Path,
    base: Path | None = None,
    report: Report = NO_REPORT,
) -> dict[str, Any]:
    """Merge the PEFT LoRA folders `adapters` (label -> folder) into the folder `out`; returns `merge.json`.

    `method` is one of `adapter_methods()`, `options` are its own (for `knots` and `elementwise` those of the
    inner method beside them). `weights` are by label or in order; without them 1/N for `product` and
    `factors`, 1 for the others, whose inner method scales. With `base`, a model folder, the adapters' layers
    are checked against it. `PeftModel.from_pretrained(base_model, out)` loads the result. `out` appears whole
    or not at all; an earlier merge there is replaced.

    Raises ConfigError for a method, option, weight or `out` that cannot be, ModelError for a folder that is
    not supported, VectorError naming file and tensor, StorageError when the disk cannot take it.
    """
    started_s = time.perf_counter()
    rule = find(method)
    resolved = resolve(rule, options)
    if not adapters:
        raise ConfigError("no adapters to merge", next_step="give at least one")
    by_label = _weights(rule, list(adapters), weights)
    check_out(out, [*adapters.values(), *([base] if base else [])])
    read: list[AdapterFolder] = []
    for label, folder in adapters.items():
        report(phase="read", step=len(read), total=len(adapters))
        read.append(read_adapter(label, folder))
    warnings = check_alike(read, rule) + _warnings(read)
    if base is not None:
        warnings += [warning for adapter in read for warning in check_base(base, adapter)]
    updates: dict[str, LowRank] = {}
    modules: dict[str, dict[str, float]] = {}
    for merged in rule.apply(read, [by_label[label] for label in adapters], resolved):
        report(phase="merge", step=len(updates), total=len(all_layers(read)))
        updates[merged.path] = merged.update
        modules[merged.path] = {"rank": merged.update.rank, **merged.errors}
    record: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "kind": "adapter",
        "method": rule.name,
        "paper": rule.paper,
        "equation": rule.equation,
        "options": resolved,
        "base": _base(read[0], base),
        "adapters": {
            adapter.label: {
                "name": adapter.folder.name,
                "weight": by_label[adapter.label],
                "ranks": sorted({module.rank for module in adapter.modules.values()}),
                "weights_sha256": adapter.weights_sha256,
                "config_sha256": adapter.config_sha256,
            }
            for adapter in read
        },
        "modules": modules,
        "warnings": warnings,
    }
    write_adapter(out, read, updates, record, started_s)
    report(phase="merge", step=len(updates), total=len(updates))
    return record


def check_alike(adapters: Sequence[AdapterFolder], rule: AdapterMethod) -> list[str]:
    """Refuse adapters of different shapes; of different layers, unless the rule takes them.

    A layer that an adapter's own configuration names is missing whatever the rule is. Returns warnings.
    Raises VectorError by name.
    """
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter in adapters:
        for path, module in adapter.modules.items():
            expected, label = shapes.setdefault(path, (module.shape, adapter.label))
            if module.shape != expected:
                raise VectorError(
                    f"adapter {adapter.label} ({adapter.folder}), layer {path!r}: expected an update "
                    f"of shape {list(expected)} as {label} has, got {list(module.shape)}",
                    next_step="merge only adapters of the same base",
                )
    warnings = []
    for adapter in adapters:
        lacking = [path for path in sorted(shapes) if path not in adapter.modules]
        missing = [path for path in lacking if not rule.any_layers or adapter.should_have(path)]
        if missing:
            raise VectorError(
                f"adapter {adapter.label} ({adapter.folder}) has no layer {missing[0]!r}, "
                f"which {shapes[missing[0]][1]} has",
                next_step="obtain the adapter again"
                if rule.any_layers
                else "merge by product or knots, or only adapters with the same target modules",
            )
        if lacking:
            warnings.append(
                f"{adapter.label} does not adapt {len(lacking)} of {len(shapes)} layers, "
                f"for example {lacking[0]}: there it counts as no change"
            )
    return warnings


def _warnings(adapters: Sequence[AdapterFolder]) -> list[str]:
    first, found = adapters[0], []
    if len(adapters) == 1:
        found.append("one adapter only; the rule is applied to it alone")
    for adapter in adapters[1:]:
        if adapter.base != first.base:
            found.append(
                f"{adapter.label} names another base than {first.label}: "
                f"{base_name(adapter.base)} and {base_name(first.base)}"
            )
        elif adapter.config.get("revision") != first.config.get("revision"):
            found.append(f"{adapter.label} names another revision of the base than {first.label}")
    seen: dict[str, str] = {}
    for adapter in adapters:
        other = seen.setdefault(adapter.weights_sha256, adapter.label)
        if other != adapter.label:
            found.append(f"{adapter.label} has the same tensors as {other}")
    return found


def _weights(rule: AdapterMethod, labels: list[str], weights: Weights) -> dict[str, float]:
    """A weight for each label. Raises ConfigError."""
    if weights is None:
        return dict.fromkeys(labels, 1.0 if rule.default_weight == "one" else 1.0 / len(labels))
    if not isinstance(weights, Mapping):
        if len(weights) != len(labels):
            raise ConfigError(
                f"{len(weights)} weights for {len(labels)} adapters", next_step="give one for each, in order"
            )
        weights = dict(zip(labels, weights, strict=True))
    for label in weights:
        if label not in labels:
            raise ConfigError(
                f"a weight for {label!r}, which is no adapter here",
                next_step=suggest(label, labels, otherwise="there are {}"),
            )
    for label in labels:
        weight: Any = weights.get(label)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and abs(weight) <= LARGEST_WEIGHT):
            problem = "no weight" if weight is None else f"{weight!r} is not a weight"
            raise ConfigError(
                f"adapter {label}: {problem}",
                next_step=f"give a number between {-LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}",
            )
    return {label: float(weights[label]) for label in labels}


def _base(first: AdapterFolder, base: Path | None) -> dict[str, str]:
    named = {"name": base_name(first.base)}
    if base is not None and (base / WEIGHTS).is_file():
        named["digest"] = model_digest(base)
    return named
