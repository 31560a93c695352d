"""What a merge method on adapters is given and gives, and where a run with `[lora]` finds its methods.

A method registers itself under the name that `[[merge]]` entries use, with a pydantic model of its options;
its module is imported in `server/language/__init__.py`.

    class MeanOptions(Options):
        weight: float = 1.0

    @adapter_method("mean", options=MeanOptions, paper="...", equation="A = w/N sum_i A_i, B = ...")
    def mean(inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.catalog import Catalog
from common.config import LoraSection, RunConfig, validate
from common.language.adapters import Adapter
from common.progress import Report
from server.merging._models import Options

if TYPE_CHECKING:
    from common.language.pool import Candidate

DOMAINS = "domains"  # the fitness that domains answer

__all__ = ["METHODS", "AdapterInputs", "AdapterMethod", "AdapterResult", "Options", "adapter_method"]


@dataclass(frozen=True)
class Domains:
    """The domains that may be asked how good a candidate is.

    `shared` are those whose owners let their adapters be passed on, with their pseudonyms: only these can be
    mixed. `ask` takes candidates for a pool of them, by pseudonym, and gives each answering domain's losses.
    """

    shared: Mapping[str, str]
    ask: Callable[[Sequence[Candidate]], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class AdapterInputs:
    """What a method merges.

    `adapters` are by domain, in the order of the names, float32 on the CPU, of the run's table; `catalogs`
    likewise; `work` is the merge's own folder, which survives a kill. `domains` are there within a run alone.
    """

    base: Path
    lora: LoraSection
    adapters: Mapping[str, Adapter]
    catalogs: Mapping[str, Catalog]
    config: RunConfig
    work: Path
    report: Report
    domains: Domains | None = None


@dataclass(frozen=True)
class AdapterResult:
    """The merged adapter, of the same table as the inputs, and by name what there is to say (JSON values).

    `coefficients` is `{group: {domain: weight}}` where the method has some.
    """

    adapter: Adapter
    facts: dict[str, Any] = field(default_factory=dict)
    coefficients: dict[str, dict[str, float]] = field(default_factory=dict)


Merge = Callable[[AdapterInputs, Mapping[str, Any]], AdapterResult]
Check = Callable[[Mapping[str, Any]], dict[str, Any]]  # options complete and right, or a ConfigError


@dataclass(frozen=True)
class AdapterMethod:
    """One method; called as its function, with options that `check` gave."""

    name: str
    merge: Merge
    check: Check
    paper: str
    equation: str

    def __call__(self, inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
        return self.merge(inputs, options)


METHODS: dict[str, AdapterMethod] = {}


def adapter_method(
    name: str, *, options: type[Options], paper: str, equation: str
) -> Callable[[Merge], Merge]:
    """Register the decorated function as the method `name`."""

    def check(given: Mapping[str, Any]) -> dict[str, Any]:
        where = f"merge method {name!r}"
        return validate(dict(given), options, where=where).model_dump(mode="json")

    def register(merge: Merge) -> Merge:
        METHODS[name] = AdapterMethod(name, merge, check, paper, equation)
        return merge

    return register
