"""Do adapters fit a base model? Looked up in its safetensors headers alone; no weight is read.

An adapter names layers as the model class that it was trained in does (`model.layers.0...`), a base folder as
the class that saved it (`layers.0...`), so two names are the same where one ends with the other.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import VectorError
from common.language.peft_folder import CONFIG_FILE, AdapterFolder, targeted
from server.folders import open_folder


def check_base(folder: Path, adapter: AdapterFolder) -> list[str]:
    """Refuse an adapter whose layers the base does not have, or has in other shapes.

    Returns warnings: layers that `target_modules` names and the adapter lacks. Raises ModelError for a
    folder that is no model, VectorError naming the tensor.
    """
    shapes = _matrices(folder)
    unmatched = set(shapes)
    for path, module in adapter.modules.items():
        names = [name for name in shapes if _same(name, path)]
        if len(names) != 1:
            raise VectorError(
                f"{adapter.folder}: adapts {path!r}, which the base {folder} does not have"
                + (" once" if names else ""),
                next_step="name the base model that the adapter was trained on",
            )
        expected = shapes[names[0]]
        turned = adapter.config.get("fan_in_fan_out")
        if module.shape != (expected[::-1] if turned else expected):
            raise VectorError(
                f"{adapter.folder}: the update of {path!r} has shape {list(module.shape)}, "
                f"the base's {names[0]}.weight has {list(expected)}",
                next_step="name the base model that the adapter was trained on",
            )
        unmatched.discard(names[0])
    targets, config = adapter.config["target_modules"], adapter.config
    if isinstance(targets, str) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []
    missing = sorted(name for name in unmatched if targeted(targets, name))
    if not missing:
        return []
    return [
        f"{adapter.label}: {len(missing)} layers of the base that {CONFIG_FILE} names are not adapted, "
        f"for example {missing[0]}"
    ]


def _same(name: str, path: str) -> bool:
    return name == path or name.endswith(f".{path}") or path.endswith(f".{name}")


def _matrices(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every two-axis `NAME.weight` of a model folder, by NAME."""
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in open_folder(folder).tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight")
    }
