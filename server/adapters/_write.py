"""Writing a merged adapter as a standard PEFT folder: whole or not at all.

The configuration has `lora_alpha` equal to `r` (by patterns where layers differ), so PEFT's scaling is 1 and
the tensors are the update itself. Tensors are float32. `README.md` is the card, `merge.json` the same facts
for machines. A folder that is in the way is replaced only where it is an earlier merge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.errors import ConfigError
from common.files import replace_folder, sha256_file, storage_errors
from common.language.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFolder
from common.low_rank import LowRank
from server.engine.card import peak_memory_bytes, recipe_toml

MERGE_FILE = "merge.json"
_TARGETING = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_out(out: Path, folders: Sequence[Path]) -> None:
    """Refuse to write over an input, or over anything that is not an earlier merge. Raises ConfigError."""
    if any(out.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"{out}: is one of the inputs", next_step="write to another folder")
    if out.exists() and not (out / MERGE_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists and is not an earlier merge", next_step="move it away, or write to another folder"
        )


def write_adapter(
    out: Path,
    adapters: Sequence[AdapterFolder],
    updates: Mapping[str, LowRank],
    record: dict[str, Any],
    started_s: float,
) -> None:
    """Write the folder `out`; adds `weights_sha256`, the seconds since `started_s` and memory to `record`.

    Raises ConfigError where a value does not fit into float32, StorageError where the disk cannot take it.
    """
    tensors = {}
    for path, update in updates.items():
        for letter, values in (("A", update.A_KC), ("B", update.B_RK)):
            with np.errstate(over="ignore"):
                tensor = np.ascontiguousarray(values, np.float32)
            if not np.isfinite(tensor).all():
                raise ConfigError(
                    f"layer {path!r}: the merge does not fit into float32",
                    next_step="use smaller weights",
                )
            tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor
    config = _config(adapters, {path: update.rank for path, update in updates.items()})
    stage = out.with_name(f".{out.name}.stage")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with storage_errors(out):
            stage.mkdir()
            save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
            record["weights_sha256"] = sha256_file(stage / WEIGHTS_FILE)
            record["seconds"] = round(time.perf_counter() - started_s, 3)
            record["peak_memory_bytes"] = peak_memory_bytes()
            (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (stage / MERGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (stage / "README.md").write_text(
                _card(record, str(config["base_model_name_or_path"] or "")), "utf-8"
            )
            for file in stage.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            replace_folder(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _config(adapters: Sequence[AdapterFolder], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of the merged adapter: that of the first, with its own ranks and a scaling of 1."""
    first = adapters[0].config
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(path)}": other for path, other in ranks.items() if other != rank}
    targeting: dict[str, Any] = {key: first.get(key) for key in _TARGETING}
    if any(_targeting(adapter) != _targeting(adapters[0]) for adapter in adapters):
        targeting = dict.fromkeys(_TARGETING) | {"target_modules": list(ranks)}
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "auto_mapping": first.get("auto_mapping"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "revision": first.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": bool(first.get("fan_in_fan_out", False)),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        **targeting,
    }


def _targeting(adapter: AdapterFolder) -> list[Any]:
    """What decides which layers are adapted, lists in any order."""
    values = [adapter.config.get(key) for key in _TARGETING]
    return [sorted(value) if isinstance(value, list) else value for value in values]


def base_name(name: str) -> str:
    """The base as the public may read it: a hub name, never the path of a local folder."""
    if not name:
        return "not named"
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else "local folder"


def _card(record: Mapping[str, Any], base: str) -> str:
    models = [
        {"path": facts["name"], "label": label, "weight": facts["weight"]}
        for label, facts in record["adapters"].items()
    ]
    recipe = recipe_toml({"method": record["method"]}, {"options": record["options"]}, models)
    rows = [
        f"| {label} | {facts['weight']:.6g} | `{facts['weights_sha256']}` |"
        for label, facts in record["adapters"].items()
    ]
    named = [f"base_model: {base}"] if base_name(base) == base else []
    head = [
        "---",
        "library_name: peft",
        *named,
        "tags:",
        "- lora",
        "- model-merging",
        f"- {record['method']}",
        "---",
    ]
    worst = [
        f"Largest {name.replace('_', ' ')} of a layer: {100 * value:.3g}% ({path})."
        for name, (value, path) in _worst(record["modules"]).items()
    ]
    parts = [
        "\n".join(head),
        f"# Merged adapter ({record['method']})",
        "A LoRA adapter merged from others, without any training.",
        "## Use\n\n```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")\n```',
        f"Base: {record['base']['name']}. The scaling is 1: the tensors are the update itself.",
        "## Merge\n\n"
        + f"Method: {record['method']} ({record['paper']}): `{record['equation']}`.\n\n"
        + "| Adapter | Weight | SHA-256 of its tensors |\n|---|---|---|\n"
        + "\n".join(rows),
        f"## Recipe\n\n```toml\n{recipe}\n```",
        "\n".join(worst),
        "\n".join(f"- Warning: {warning}" for warning in record["warnings"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _worst(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """The largest of each error over the layers, and where."""
    names = sorted({name for facts in modules.values() for name in facts} - {"rank"})
    return {
        name: max((facts[name], path) for path, facts in modules.items() if name in facts) for name in names
    }
