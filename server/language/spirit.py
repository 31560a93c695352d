"""The base spirit without pooled data: the other domains' adapters merged, or a public adapter.

RecCocktail trains its base spirit on all domains' data in one place. Here nobody may: the spirit is merged
from the adapters of the others, by any registered method (the training-free rules, or learned coefficients),
or it is an adapter that the operator trained on public instruction data, read from a PEFT folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import LoraSection
from common.errors import ConfigError, suggest
from common.language.adapters import Adapter, adapter_tensors, check_adapter, is_adapter, load_adapter
from common.progress import prefixed
from server.language.registry import METHODS, AdapterInputs, AdapterResult


def spirit(
    inputs: AdapterInputs,
    method: str,
    *,
    without: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> AdapterResult:
    """The base spirit for domain `without`: the others' adapters merged by `method`, or the adapter in the
    folder `method`.

    `options` are the method's. None of `without`'s adapter or catalog is read. Raises ConfigError for an
    unknown method, or where no other domain is left; else as the method does.
    """
    if "/" in method or is_adapter(Path(method)):
        return AdapterResult(
            public_adapter(Path(method), inputs.base, inputs.lora), {"spirit": "public adapter"}
        )
    if method not in METHODS:
        raise ConfigError(f"no base spirit {method!r}", next_step=suggest(method, METHODS))
    others = {name: adapter for name, adapter in inputs.adapters.items() if name != without}
    if not others:
        raise ConfigError(
            f"no domain beside {without!r} to merge a base spirit from",
            next_step="invite other domains, or give the folder of a public adapter",
        )
    catalogs = {name: catalog for name, catalog in inputs.catalogs.items() if name in others}
    work = inputs.work / "spirit"
    work.mkdir(parents=True, exist_ok=True)
    report = prefixed(inputs.report, "spirit")
    given = replace(inputs, adapters=others, catalogs=catalogs, work=work, report=report)
    made = METHODS[method](given, METHODS[method].check(options or {}))
    return replace(made, facts={**made.facts, "spirit": method, "domains": list(others)})


def public_adapter(folder: Path, base: Path, lora: LoraSection) -> Adapter:
    """The adapter in a PEFT folder as one of `lora`: scaling taken into A and B, rank cut or filled up.

    Raises ModelError or VectorError where it does not fit the base or the modules.
    """
    from common.language.mixing import cut, rescaled

    section, adapter = load_adapter(folder, base)
    fitted, _ = cut(rescaled(adapter, section, lora), lora.rank)
    check_adapter(fitted, adapter_tensors(base, lora))
    return fitted
