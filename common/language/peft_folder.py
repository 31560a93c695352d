"""Strict reading of PEFT LoRA folders: `adapter_config.json` and `adapter_model.safetensors`.

Rules: what is not understood is refused by name, because an adapter that is read wrongly still merges.
Supported is plain LoRA on linear layers: any rank and scaling (also by `rank_pattern`, `alpha_pattern` and
`use_rslora`), float32, float16 or bfloat16. Refused: every other PEFT type, DoRA, biases, `modules_to_save`,
adapted embeddings and convolutions, initialisations that change the base's own weights (PiSSA, OLoRA, CorDA,
LoftQ, LoRA-GA), any setting that is not known here, and pickle. Every value is read once and must be finite.

The update of a linear layer's weight [R, C] is `s B A` with `B` [R, K], `A` [K, C] and the scaling
`s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`. Rank and alpha of a layer follow the first
pattern that matches its path, as in PEFT: `(.*\\.)?(KEY)$`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelError, VectorError
from common.files import sha256_file
from common.models.weights import WeightEntry, read_weights
from common.tensorfile import ITEM_BYTES, Floats, as_float32

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 1e9  # rank or alpha
SUPPORTED = "supported is plain LoRA on linear layers (no DoRA, no bias, no modules_to_save)"

_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
         "base_model_name_or_path", "bias", "init_lora_weights"}  # fmt: skip
_HARMLESS = {  # what these say does not change what `s B A` is
    "task_type", "auto_mapping", "peft_version", "inference_mode", "revision", "lora_dropout",
    "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "qalora_group_size", "velora_config",
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One adapted linear layer: `A` [K, C] and `B` [R, K] in the file, and the scaling of their product."""

    path: str
    A: WeightEntry
    B: WeightEntry
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[R, C] of the layer's weight: outputs by inputs."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class AdapterFolder:
    """One checked adapter folder; values are read from the file when asked for."""

    label: str
    folder: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    weights_sha256: str
    config_sha256: str

    @property
    def base(self) -> str:
        """The base model's name or path, as the adapter's configuration says it."""
        return str(self.config.get("base_model_name_or_path") or "")

    def should_have(self, path: str) -> bool:
        """Whether the configuration says that the layer at `path` is adapted."""
        some = self.config.get("layers_to_transform") or self.config.get("exclude_modules")
        return not some and targeted(self.config["target_modules"], path)

    def factors(self, path: str) -> tuple[Floats, Floats]:
        """`B` [R, K] and `A` [K, C] of one layer in float32, without the scaling."""
        module = self.modules[path]
        return self._values(module.B), self._values(module.A)

    def _values(self, entry: WeightEntry) -> Floats:
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            file.seek(entry.start)
            return as_float32(file.read(entry.end - entry.start), entry.dtype).reshape(entry.shape)


def read_adapter(label: str, folder: Path) -> AdapterFolder:
    """The adapter in `folder`, every value looked at once.

    Raises ModelError for a folder or setting that is not supported, VectorError naming file and tensor for
    one that is missing, extra, misshapen, of another type or not finite.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: no {name}",
                next_step="give a folder that PeftModel.save_pretrained wrote, as safetensors (never pickle)",
            )
    config = read_settings(folder)
    modules = _read_modules(folder, config)
    digests = (sha256_file(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE))
    adapter = AdapterFolder(label, folder, config, modules, *digests)
    for path, module in modules.items():
        for entry, values in zip((module.B, module.A), adapter.factors(path), strict=True):
            if not np.isfinite(values).all():
                raise VectorError(
                    f"{folder / WEIGHTS_FILE}, tensor {entry.name!r}: holds NaN or infinite values",
                    next_step="train the adapter again; its training diverged",
                )
    return adapter


def read_settings(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder. Raises ModelError where it asks for anything but plain LoRA."""
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a JSON object", next_step="obtain the adapter again")
    if config.get("peft_type") != "LORA":
        raise _unsupported(file, "peft_type", config.get("peft_type"))
    if config.get("bias", "none") != "none":
        raise _unsupported(file, "bias", config["bias"])
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise ModelError(
            f"{file}: init_lora_weights = {config['init_lora_weights']!r} changes the base's own weights, "
            "so the adapter does not belong to the base that it names",
            next_step="convert it: model.save_pretrained(OUT, path_initial_model_for_weight_conversion=...)",
        )
    for key, value in config.items():
        if key not in _READ | _HARMLESS and value not in (None, False, [], {}):
            raise _unsupported(file, key, value)
    _check_numbers(file, config)
    return config


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    """Rank and alpha must be positive numbers, the patterns objects of them under regular expressions."""
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{file}: {pattern} is not an object", next_step="mend the configuration")
        for where, value in (
            (key, config.get(key)),
            *((f"{pattern}: {at}", n) for at, n in patterns.items()),
        ):
            whole = key == "lora_alpha" or isinstance(value, int)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (whole and number and 0 < value <= LARGEST):  # neither NaN nor what no float can hold
                raise ModelError(
                    f"{file}: {where}: expected a number above 0, got {value!r}",
                    next_step="mend the configuration",
                )
        for at in patterns:
            try:
                re.compile(at)
            except re.error as err:
                raise ModelError(
                    f"{file}: {pattern}: {at!r} is not a regular expression: {err}",
                    next_step="mend the configuration",
                ) from None


def _unsupported(file: Path, key: str, value: Any) -> ModelError:
    return ModelError(
        f"{file}: {key} = {value!r} is not supported",
        next_step=f"{SUPPORTED}; train such an adapter, or merge it into its base and merge full models",
    )


def _read_modules(folder: Path, config: Mapping[str, Any]) -> dict[str, Module]:
    """Every adapted layer by its path in the model, sorted."""
    file = folder / WEIGHTS_FILE
    found: dict[str, dict[str, WeightEntry]] = {}
    for entry in read_weights(file):
        match = _TENSOR.fullmatch(entry.name)
        if match is None:
            raise VectorError(
                f"{file}: extra tensor {entry.name!r}",
                next_step=f"{SUPPORTED}: `{PREFIX}PATH.lora_A.weight` and `.lora_B.weight`",
            )
        if entry.dtype not in ITEM_BYTES or len(entry.shape) != 2 or 0 in entry.shape:
            raise VectorError(
                f"{file}, tensor {entry.name!r}: expected two axes of {', '.join(ITEM_BYTES)}, "
                f"got {entry.dtype} {list(entry.shape)}",
                next_step=SUPPORTED,
            )
        found.setdefault(match[1], {})[match[2]] = entry
    if not found:
        raise VectorError(f"{file}: it has no tensors", next_step="obtain the adapter again")
    modules = {path: _module(file, config, path, found[path]) for path in sorted(found)}
    _check_targets(file, config, modules)
    return modules


def _module(file: Path, config: Mapping[str, Any], path: str, pair: Mapping[str, WeightEntry]) -> Module:
    for letter in "AB":
        if letter not in pair:
            raise VectorError(
                f"{file}: no tensor '{PREFIX}{path}.lora_{letter}.weight'",
                next_step="obtain the adapter again; each layer needs lora_A and lora_B",
            )
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    for letter, axis in (("A", 0), ("B", 1)):
        entry = pair[letter]
        if entry.shape[axis] != rank:
            expected = [rank, entry.shape[1]] if letter == "A" else [entry.shape[0], rank]
            raise VectorError(
                f"{file}, tensor {entry.name!r}: expected shape {expected} (rank {rank} by {CONFIG_FILE}), "
                f"got {list(entry.shape)}",
                next_step="use the configuration that was saved with these tensors",
            )
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Module(path, pair["A"], pair["B"], float(scaling))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path`, as PEFT chooses it."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def targeted(targets: Any, path: str) -> bool:
    """Whether `target_modules` of a configuration names the layer at `path`, as PEFT reads it."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _check_targets(file: Path, config: Mapping[str, Any], modules: Mapping[str, Module]) -> None:
    """Tensors and `target_modules` must agree: PEFT would leave the one out and the other random."""
    targets = config.get("target_modules")
    listed = isinstance(targets, Sequence) and all(isinstance(target, str) for target in targets)
    if not targets or not listed:
        raise ModelError(
            f"{file.with_name(CONFIG_FILE)}: target_modules is missing, or neither text nor a list of texts",
            next_step="name the layers that the adapter changes",
        )
    for path, module in modules.items():
        if not targeted(targets, path):
            raise VectorError(
                f"{file}: extra tensor {module.A.name!r}: target_modules does not name its layer",
                next_step="use the configuration that was saved with these tensors",
            )
    for target in [] if isinstance(targets, str) else targets:
        if not any(targeted([target], path) for path in modules):
            raise VectorError(
                f"{file}: no tensor of the target module {target!r}",
                next_step="use the configuration that was saved with these tensors",
            )
