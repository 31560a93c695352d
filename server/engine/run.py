"""Run a recipe: `merge_folders(recipe)` leaves the merged folder and returns what its `merge.json` says.

Order: everything that can be refused is refused first, from headers alone. Then one pass over the files (two
or three for methods that need thresholds) writes the weights; the base's configuration and tokenizer files,
`merge.json` and the card follow; then the folder appears under its name.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.files import named_os_errors, storage_errors
from common.progress import NO_REPORT, Report
from server.engine import card
from server.engine.digests import Digests
from server.engine.inputs import Inputs, check_memory, check_out, check_settings, merge_key
from server.engine.passes import write_merge
from server.engine.recipe import Recipe
from server.engine.staging import CHECKPOINT_BYTES, Staging, check_space, copy_companions
from server.engine.stream import Reader
from server.engine.writing import WeightWriter
from server.folders import FLOATS, is_adapter
from server.merging import Method, find, unknown_name
from server.merging._vectors import BLOCK_VALUES, Floats, block_values

SCHEMA_VERSION = 1
_CONFIG_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@named_os_errors()
def merge_folders(
    recipe: Recipe, *, force: bool = False, digests: bool = True, workers: int = 1, report: Report = NO_REPORT
) -> dict[str, Any]:
    """Merge by `recipe` into the folder `recipe.out`; returns the content of its `merge.json`.

    force: replace an output folder that exists. digests: SHA-256 of the inputs for the card.
    workers: processes at most, for methods that read blocks.
    Raises ConfigError (recipe, options, output), ModelError and BaseMismatchError (folders), VectorError
    (naming file and tensor), DataError (catalogs), StorageError (a disk that is full, a file that may not be
    read or written).
    """
    started_s = time.monotonic()
    check_out(recipe)
    adapters = [entry for entry in recipe.models if is_adapter(entry.path)]
    if adapters:
        return _merge_adapters(recipe, force=force, report=report)
    method = _find(recipe.method)
    options = _resolve(method, recipe) if method else dict(recipe.options)
    inputs = Inputs(recipe)
    with_catalogs = method is None or method.needs == "grams"
    check_settings(recipe, learns=method is None, needs_catalogs=with_catalogs, warnings=inputs.warnings)
    if method is not None and method.unit != "block" and not with_catalogs:
        sizes = [block_values(method.unit, t.name, t.shape) for t in inputs.base.tensors.values()]
        check_memory(recipe, max(sizes, default=0))
    known = Digests(inputs.files, enabled=digests)
    with Staging(recipe.out, merge_key(recipe, options, inputs), force=force) as stage:
        writer = WeightWriter(inputs.base, stage.folder, recipe.dtype)
        if not writer.is_staged():
            stage.done_tensors = 0
            check_space(recipe.out, sum(writer.sizes.values()))
        is_large = sum(writer.sizes.values()) > CHECKPOINT_BYTES
        writer.will_flush = is_large and sys.platform == "linux"
        copy_companions(inputs.base, stage.folder, _CONFIG_DTYPES.get(recipe.dtype))
        with writer, inputs.vectors() as vectors:
            inputs.check_buffers(vectors.reader)
            vectors.workers = workers
            found: dict[str, Any] = {"coefficients": {}}
            catalogs: dict[str, dict[str, str]] = {}
            if with_catalogs:
                from server.engine.learned import learn_vector

                learned = learn_vector(inputs, vectors, stage.work, report)
                found, options, catalogs = learned.found, learned.options, learned.catalogs
                if learned.trajectory:
                    shutil.copyfile(learned.trajectory, stage.folder / learned.trajectory.name)
                _write_vector(inputs, learned.vector, vectors.reader, writer)
            elif method is not None:
                with np.errstate(over="ignore", invalid="ignore"):  # every result is looked at
                    write_merge(method, options, vectors, stage, writer, report)
            _copy_buffers(inputs, vectors.reader, writer)
            writer.write_indexes()
            if is_large:
                writer.flush()
            inputs.warnings += vectors.seen.warnings(vectors.labels, vectors.weight_N)
        sha256 = known.wait()
        known.check_unchanged()
        record = _record(inputs, method, options, sha256, catalogs)
        seconds = time.monotonic() - started_s
        record |= found
        record |= {
            "warnings": inputs.warnings,
            "resumed_tensors": stage.done_tensors,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": card.peak_memory_bytes() + vectors.others_bytes,
            "bytes_read": vectors.reader.bytes_read,
            "bytes_written": writer.bytes_written,
            "mb_per_s": round((vectors.reader.bytes_read + writer.bytes_written) / seconds / 1e6, 1),
        }
        card.write(stage.folder, record, inputs.base)
        stage.publish(durable=is_large)
    return record


def _record(
    inputs: Inputs,
    method: Method | None,
    options: Mapping[str, Any],
    sha256: Mapping[Path, str],
    catalogs: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The recipe as it was carried out, and its inputs by digest."""
    recipe = inputs.recipe
    models = {
        entry.label: {
            **card.folder_facts(inputs.folders[entry.label], sha256),
            "weight": 1.0 if entry.weight is None else entry.weight,
            **({"catalog": dict(catalogs[entry.label])} if entry.label in catalogs else {}),
        }
        for entry in recipe.models
    }
    return {
        "schema": SCHEMA_VERSION,
        **card.method_facts(recipe.method, method),
        "options": dict(options),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "base": card.folder_facts(inputs.base, sha256),
        "models": models,
    }


def _find(name: str) -> Method | None:
    """The training-free method `name`, or None for a learned one. Raises ConfigError."""
    try:
        return find(name)
    except ConfigError:
        from server.merge import LEARNED_PAPERS, known_methods

        if name in LEARNED_PAPERS:
            return None
        from server.adapters import adapter_methods

        if name in adapter_methods():
            raise ConfigError(
                f"merge method {name!r} merges adapters, and the models are full ones",
                next_step="choose another method (--explain all), or give adapters",
            ) from None
        raise unknown_name("merge method", name, known_methods()) from None


def _resolve(method: Method, recipe: Recipe) -> dict[str, Any]:
    """Every option with its value. The recipe's seed is that of a method that draws, if it names none."""
    options = method.resolve(recipe.options)
    if "seed" in options and "seed" not in recipe.options:
        options["seed"] = recipe.seed
    return options


def _write_vector(inputs: Inputs, vector: Mapping[str, Floats], reader: Reader, writer: WeightWriter) -> None:
    """Write the base plus a merged vector that is in memory and need not have every tensor."""
    base_X = np.empty(BLOCK_VALUES, np.float32)
    zero_X = np.zeros(BLOCK_VALUES, np.float32)
    for tensor in inputs.base.tensors.values():
        if tensor.dtype not in FLOATS:
            continue
        tau_X = vector[tensor.name].reshape(-1) if tensor.name in vector else None
        for start in range(0, tensor.size, BLOCK_VALUES):
            width = min(BLOCK_VALUES, tensor.size - start)
            reader.read(tensor, start, base_X[:width])
            part_X = zero_X[:width] if tau_X is None else tau_X[start : start + width]
            writer.add(tensor.name, start, base_X[:width], part_X)


def _copy_buffers(inputs: Inputs, reader: Reader, writer: WeightWriter) -> None:
    for tensor in inputs.base.tensors.values():
        if tensor.dtype not in FLOATS:
            writer.copy(tensor, reader)


def _merge_adapters(recipe: Recipe, *, force: bool, report: Report) -> dict[str, Any]:
    """Adapters merge as adapters, in `server.adapters`."""
    full = [entry for entry in recipe.models if not is_adapter(entry.path)]
    if full:
        raise ConfigError(
            f"{full[0].path} is a full model, {recipe.models[0].path} and others are adapters"
            if full[0] is not recipe.models[0]
            else f"{full[0].path} is a full model, but other models are adapters",
            next_step="merge adapters with adapters, or merge each adapter into its base first",
        )
    _check_adapter_settings(recipe)
    from server.adapters import merge_adapters

    with storage_errors(recipe.out):
        Staging(recipe.out, "", force=force)  # the same rules for an output folder that exists
    given = {entry.label: entry.weight for entry in recipe.models if entry.weight is not None}
    return merge_adapters(
        {entry.label: entry.path for entry in recipe.models},
        method=recipe.method,
        options=recipe.options,
        weights={entry.label: given.get(entry.label, 1.0) for entry in recipe.models} if given else None,
        out=recipe.out,
        base=recipe.base,
        report=report,
    )


def _check_adapter_settings(recipe: Recipe) -> None:
    """Refuse what a merge of adapters has no use for: it needs no texts and writes float32."""
    given = {
        "dtype": recipe.dtype not in ("base", "fp32"),
        "device": recipe.device == "cuda",
        "learning": bool(recipe.learning),
        "text": bool(recipe.text),
        "catalog": any(entry.catalog for entry in recipe.models),
    }
    for key, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{key} was given, but the models are adapters: they merge as their factors, in float32",
                next_step=f"leave {key} out",
            )
