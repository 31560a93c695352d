"""The rules by which adapters merge: `product`, `factors`, `elementwise` and `knots`.

Given are adapters i = 1..N whose update of a layer is `s_i B_i A_i`, and weights `w_i`. A rule returns an
update `B A` with a scaling of 1. Only `product` is `sum_i w_i s_i B_i A_i`, the weighted sum of what the
adapters do. Mixing A and B separately is another thing: `(sum_i w_i B_i)(sum_j w_j A_j)` also holds every
`B_i A_j` of two different adapters, and weighs `B_i A_i` by `w_i^2`. `factors` says for each layer how far
from the product that leads.

A rule reads one layer of every adapter at a time; the merged factors are kept until they are written.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from common.config import validate
from common.errors import ConfigError, VectorError
from common.language.peft_folder import AdapterFolder
from common.low_rank import LowRank, distance, stack, truncate
from server import merging
from server.adapters._knots import align
from server.adapters._lazy import Lazy
from server.merging import Floats, unknown_name
from server.merging._models import Options

__all__ = ["AdapterMethod", "Merged", "adapter_methods", "find", "resolve"]

Rank = Annotated[int, Field(ge=1)]


class ProductOptions(Options):
    """`rank` None keeps all ranks (they add up); a number truncates to the nearest update of that rank."""

    rank: Rank | None = None


class FactorsOptions(Options):
    """`both`: `w_i` on A and on B (the papers). `sqrt`: `sqrt(|w_i|)` on both, the sign on A (PEFT)."""

    weighting: Literal["both", "sqrt"] = "both"


class ElementwiseOptions(Options):
    """`method` of `server.merging`, whose own options stand beside it; `weighting` as for `factors`."""

    method: str = "ties"
    weighting: Literal["both", "sqrt"] = "both"


class KnotsOptions(Options):
    """`method` of `server.merging`, whose own options stand beside it; `rank` truncates what comes out.

    `sigma`: whether the singular values are multiplied in before the parts are merged (as the authors' code
    does: a strong direction's entries are large) or after (as their equation reads). Linear methods do not
    care; TIES trims other entries.
    """

    method: str = "ties"
    sigma: Literal["before", "after"] = "before"
    rank: Rank | None = None


@dataclass(frozen=True)
class Merged:
    """One layer's merged update `B A` and, by name, how far it is from what (relative, Frobenius)."""

    path: str
    update: LowRank
    errors: dict[str, float]


Apply = Callable[[Sequence[AdapterFolder], Sequence[float], Mapping[str, Any]], Iterator[Merged]]


@dataclass(frozen=True)
class AdapterMethod:
    """One rule. `default_weight` of N adapters is 1/N (`mean`), or 1 where an inner method scales (`one`).

    With `any_layers` and ranks adapters may differ in the layers that they adapt: what one does not adapt, it
    leaves as the base has it, an update of rank 0.
    """

    name: str
    paper: str
    equation: str
    apply: Apply
    options: type[Options]
    default_weight: Literal["mean", "one"]
    any_layers: bool = False

    @property
    def summary(self) -> str:
        """What the rule does, needs and costs."""
        return inspect.getdoc(self.apply) or ""

    @property
    def takes_method(self) -> bool:
        """Whether the rule has an option `method`, whose options are given along with its own."""
        return "method" in self.options.model_fields


def product(
    adapters: Sequence[AdapterFolder], weights: Sequence[float], options: Mapping[str, Any]
) -> Iterator[Merged]:
    """The exact weighted sum of the updates, as an adapter whose rank is the sum of the ranks.

    With `rank` it is cut to the nearest update of that rank (Eckart-Young) by QR of the factors and an SVD
    of the small core; each layer's relative residual is reported. Ranks and layers may differ.
    """
    for path in all_layers(adapters):
        total = stack(_updates(adapters, path), weights)
        if options["rank"] is None:
            yield Merged(path, total, {"residual": 0.0})
        else:
            best, residual = truncate(total, options["rank"])
            yield Merged(path, best, {"residual": residual})


def factors(
    adapters: Sequence[AdapterFolder], weights: Sequence[float], options: Mapping[str, Any]
) -> Iterator[Merged]:
    """A and B averaged separately; needs equal ranks. This is not the sum of the updates.

    RecCocktail's and Evo-Merging's rule. Each adapter's scaling goes into its factors as `sqrt(s_i)`, which
    changes nothing where all have the same. How far the result is from `product` is reported by layer, save
    where the product is zero.
    """
    _check_equal_ranks(adapters, "factors")
    for path in adapters[0].modules:
        left, right = _factor_weights(adapters, path, weights, options["weighting"])
        pairs = [LowRank.of(*adapter.factors(path)) for adapter in adapters]
        mixed = LowRank(
            sum((w * pair.B_RK for w, pair in zip(left, pairs, strict=True)), np.zeros_like(pairs[0].B_RK)),
            sum((w * pair.A_KC for w, pair in zip(right, pairs, strict=True)), np.zeros_like(pairs[0].A_KC)),
        )
        off = distance(mixed, stack(_updates(adapters, path), weights))
        yield Merged(path, mixed, {"distance_from_product": off} if math.isfinite(off) else {})


def elementwise(
    adapters: Sequence[AdapterFolder], weights: Sequence[float], options: Mapping[str, Any]
) -> Iterator[Merged]:
    """A training-free method on all A and B as if they were a model's tensors; needs equal ranks.

    For comparison with other tools: A and B mean nothing on their own (any `B M^-1, M A` is the same
    adapter), so neither does the merge of their entries. Prefer `product` or `knots`.
    """
    _check_equal_ranks(adapters, "elementwise")

    def read(vector: int, name: str) -> Floats:
        path, letter = name.rsplit(".", 1)
        left, right = _factor_weights(adapters, path, weights, options["weighting"])
        B_RK, A_KC = adapters[vector].factors(path)
        return np.float32(right[vector]) * A_KC if letter == "A" else np.float32(left[vector]) * B_RK

    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in adapters[0].modules.items():
        shapes |= {f"{path}.A": module.A.shape, f"{path}.B": module.B.shape}
    vectors = Lazy([adapter.label for adapter in adapters], shapes, read)
    merged = merging.merge(options["method"], vectors, _inner(options, ElementwiseOptions))
    for path in adapters[0].modules:
        yield Merged(path, LowRank.of(merged[f"{path}.B"], merged[f"{path}.A"]), {})


def knots(
    adapters: Sequence[AdapterFolder], weights: Sequence[float], options: Mapping[str, Any]
) -> Iterator[Merged]:
    """The updates rotated into a common basis by one SVD a layer, then merged entry by entry.

    Ranks and layers may differ. The result's rank is at most the sum of theirs; with `rank` it is truncated
    and the residual reported. The weights multiply the aligned parts. Each layer's bases stay in memory: as
    much as the adapters themselves.
    """
    aligned = {path: align(_updates(adapters, path)) for path in all_layers(adapters)}
    scaled = options["sigma"] == "before"

    def read(vector: int, path: str) -> Floats:
        return np.float32(weights[vector]) * aligned[path].part(vector, scaled=scaled)

    shapes = {path: layer.part_shape for path, layer in aligned.items()}
    vectors = Lazy([adapter.label for adapter in adapters], shapes, read)
    merged = merging.merge(options["method"], vectors, _inner(options, KnotsOptions))
    for path, layer in aligned.items():
        update, residual = layer.restore(merged[path], scaled=scaled), 0.0
        if options["rank"] is not None:
            update, residual = truncate(update, options["rank"])
        yield Merged(path, update, {"residual": residual})


_PRODUCT = AdapterMethod(
    "product",
    "exact; truncation by Eckart and Young, 1936",
    "B A = sum_i w_i s_i B_i A_i",
    product,
    ProductOptions,
    "mean",
    any_layers=True,
)
_FACTORS = AdapterMethod(
    "factors",
    "RecCocktail; Evo-Merging",
    "A = sum_i w_i A_i, B = sum_i w_i B_i",
    factors,
    FactorsOptions,
    "mean",
)
_ELEMENTWISE = AdapterMethod(
    "elementwise",
    "that of the option `method`",
    "A = merge_i(w_i A_i), B = merge_i(w_i B_i)",
    elementwise,
    ElementwiseOptions,
    "one",
)
_KNOTS = AdapterMethod(
    "knots",
    "Stoica et al., ICLR 2025",
    "[s_1 B_1 A_1 ... s_N B_N A_N] = U S [V_1^T ... V_N^T]; B A = U merge_i(w_i S V_i^T)",
    knots,
    KnotsOptions,
    "one",
    any_layers=True,
)


def adapter_methods() -> dict[str, AdapterMethod]:
    """Every rule by name."""
    return {method.name: method for method in (_PRODUCT, _FACTORS, _ELEMENTWISE, _KNOTS)}


def find(name: str) -> AdapterMethod:
    """The rule called `name`. Raises ConfigError with the nearest name."""
    known = adapter_methods()
    if name in known:
        return known[name]
    if name in merging.methods():
        raise ConfigError(
            f"merge method {name!r} merges full models; adapters merge by {', '.join(known)}",
            next_step=f"method = 'knots' with the option method = {name!r}, or method = 'product'",
        )
    raise unknown_name("adapter merge method", name, known)


def resolve(method: AdapterMethod, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """All options of a rule with their values, those of its inner method included.

    Raises ConfigError for an unknown or impossible option, or an inner method that needs more than the
    entries of its vectors.
    """
    given = dict(options or {})
    if not method.takes_method:
        return validate(given, method.options, where=f"merge method {method.name!r}").model_dump()
    own = {key: given.pop(key) for key in list(given) if key in method.options.model_fields}
    resolved = validate(own, method.options, where=f"merge method {method.name!r}").model_dump()
    inner = merging.find(resolved["method"])
    if inner.unit != "block" or inner.needs:
        raise ConfigError(
            f"merge method {method.name!r}: {inner.name!r} does not work entry by entry",
            next_step="choose one that does, for example task-arithmetic or ties",
        )
    return resolved | inner.resolve(given)


def all_layers(adapters: Sequence[AdapterFolder]) -> list[str]:
    """Every layer that one of the adapters adapts."""
    return sorted({path for adapter in adapters for path in adapter.modules})


def _updates(adapters: Sequence[AdapterFolder], path: str) -> list[LowRank]:
    """`s_i B_i A_i` of one layer for each adapter, the scaling on A; of rank 0 where it is not adapted."""
    rows, columns = next(a.modules[path].shape for a in adapters if path in a.modules)
    return [
        stack([LowRank.of(*adapter.factors(path))], [adapter.modules[path].scaling])
        if path in adapter.modules
        else LowRank(np.zeros((rows, 0)), np.zeros((0, columns)))
        for adapter in adapters
    ]


def _factor_weights(
    adapters: Sequence[AdapterFolder], path: str, weights: Sequence[float], weighting: str
) -> tuple[list[float], list[float]]:
    """What B_i and A_i are multiplied by."""
    roots = [math.sqrt(adapter.modules[path].scaling) for adapter in adapters]
    if weighting == "both":
        both = [w * root for w, root in zip(weights, roots, strict=True)]
        return both, both
    left = [math.sqrt(abs(w)) * root for w, root in zip(weights, roots, strict=True)]
    return left, [math.copysign(value, w) for value, w in zip(left, weights, strict=True)]


def _check_equal_ranks(adapters: Sequence[AdapterFolder], method: str) -> None:
    for path, first in adapters[0].modules.items():
        for adapter in adapters[1:]:
            if adapter.modules[path].rank != first.rank:
                raise VectorError(
                    f"adapters {adapters[0].label} and {adapter.label}, layer {path!r}: {method} needs equal "
                    f"ranks, got {first.rank} and {adapter.modules[path].rank}",
                    next_step="use product or knots, which take any ranks",
                )


def _inner(options: Mapping[str, Any], own: type[Options]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in own.model_fields}
