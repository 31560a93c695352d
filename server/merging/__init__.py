"""Training-free merge methods: a registry, and one file a method. numpy only; no torch.

A method is a small typed function of N task vectors and its options that returns a *kernel*: a function
from one block of the vectors (`tau_NX`: N vectors by X values) to the merged values of that block. What
needs a look at whole vectors first (a threshold) takes it before it returns the kernel. So memory is a
block of every vector, whatever the model's size. Adding a method means adding one file here:

    @merge_method("median", paper="...", equation="tau = median_d tau_d")
    def median(vectors: Vectors, *, lambda_: Weight = 1.0) -> Kernel:
        return lambda block: np.float32(lambda_) * np.median(block.tau_NX, axis=0)

The keyword-only parameters are the options; their annotations say what is allowed, and a trailing
underscore (for Python's own words) is not part of the option's name. The first paragraph of the docstring
says what the method does, the rest what it costs and where it differs from other tools.

A method that is registered with `splits=True` returns `[N, X]` from its kernel: N processed vectors whose
plain sum is the merge. Learned coefficients can then start from those vectors (at 1, the merge itself).
`unit` says what a block has to hold: any values, whole rows, the whole matrix of a linear layer
(`block.is_linear`, `block.matrices()`) or a whole tensor; `block_values` in `_vectors.py` has the sizes.
`needs="grams"` gives the method the Gram matrices of each layer's inputs as its second argument.
`linear=True` says that a merged value is not finite where a vector's is not (a weighted sum, also with
weights of 0: `0 * inf` is NaN): then nobody has to look at each vector for NaN.

Modules whose name starts with an underscore are helpers. Everything is computed in float32 unless a file
says otherwise.

    >>> one, two = {"w": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)}
    >>> merge("weight-averaging", InMemory({"a": one, "b": two}))["w"]
    array([0.5, 0.5], dtype=float32)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common.errors import ConfigError, suggest
from server.merging._options import (
    Bounds,
    Density,
    Probability,
    Weight,
    as_arguments,
    resolve,
)
from server.merging._vectors import Block, Floats, Grams, InMemory, Unit, Vectors

if TYPE_CHECKING:
    from server.merging._models import Options

__all__ = [
    "PROCESS_INITIAL",
    "Block",
    "Bounds",
    "Density",
    "Floats",
    "Grams",
    "InMemory",
    "Kernel",
    "Method",
    "Probability",
    "Unit",
    "Vectors",
    "Weight",
    "merge",
    "merge_method",
    "methods",
    "prepare",
    "process_vectors",
    "processes",
    "unknown_name",
]

Kernel = Callable[[Block], Floats]
Need = Literal["", "grams"]

PROCESS_INITIAL = 1.0  # processed vectors are summed as they are: learning starts at the merge itself


@dataclass(frozen=True)
class Method:
    """One registered training-free method. `plan(vectors, [grams,] **options)` gives its kernel."""

    name: str
    paper: str
    equation: str
    plan: Callable[..., Kernel]
    unit: Unit
    splits: bool
    needs: Need
    linear: bool

    @property
    def summary(self) -> str:
        """The docstring of the method's function: what it does, needs and costs."""
        return inspect.getdoc(self.plan) or ""

    @functools.cached_property
    def options(self) -> type[Options]:
        """A strict pydantic model of the options."""
        from server.merging._models import options_model

        return options_model(self.name, self.plan)

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every option with its value, checked. Raises ConfigError with the nearest known key."""
        return resolve(self.name, self.plan, options)


PlanT = typing.TypeVar("PlanT", bound=Callable[..., Kernel])

_METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    paper: str,
    equation: str,
    unit: Unit = "block",
    splits: bool = False,
    needs: Need = "",
    linear: bool = False,
) -> Callable[[PlanT], PlanT]:
    """Register the function as method `name`; `paper` and `equation` say what it computes."""

    def register(function: PlanT) -> PlanT:
        _refuse_twice(name, function)
        _METHODS[name] = Method(name, paper, equation, function, unit, splits, needs, linear)
        return function

    return register


def methods() -> dict[str, Method]:
    """Every training-free method by name, found in this package's files."""
    _discover()
    return dict(_METHODS)


def processes() -> dict[str, Method]:
    """The methods whose processed vectors learned coefficients can start from."""
    return {name: method for name, method in methods().items() if method.splits}


def find(name: str) -> Method:
    """The method called `name`. Raises ConfigError with the nearest known name."""
    file = f"{__name__}.{name.replace('-', '_')}"
    is_file = file.rpartition(".")[2].isidentifier() and not name.startswith("_") and "." not in name
    if name not in _METHODS and is_file and importlib.util.find_spec(file):
        importlib.import_module(file)  # a method mostly lives in the file of its name: leave the others
    if name in _METHODS:
        return _METHODS[name]
    known = methods()
    if name not in known:
        raise unknown_name("merge method", name, known)
    return known[name]


def prepare(
    method: Method, vectors: Vectors, options: Mapping[str, Any] | None = None, grams: Grams | None = None
) -> Kernel:
    """The kernel of `method` for these vectors, its options checked: one block in, its merged values out.

    The values are [X] or of the block's shape. Raises ConfigError for an unknown or impossible option, or
    where the method needs Gram matrices and there are none; VectorError for vectors that cannot be merged.
    """
    kernel = _plan(method, vectors, options, grams)
    return (lambda block: _total(kernel(block))) if method.splits else kernel


def _total(values_NX: Floats) -> Floats:
    """The sum over N; BLAS takes little more than half of what numpy's `sum` does."""
    return np.ones(len(values_NX), np.float32) @ values_NX


def _plan(method: Method, vectors: Vectors, options: Mapping[str, Any] | None, grams: Grams | None) -> Kernel:
    """The kernel as the method's file wrote it: of a method that splits it gives [N, X]."""
    checked = method.resolve(options or {})
    arguments: list[Any] = [vectors]
    if method.needs == "grams":
        if grams is None:
            raise ConfigError(
                f"merge method {method.name!r} needs the catalogs of the domains",
                next_step="name each model's catalog, or use a method that needs none",
            )
        arguments.append(grams)
    return method.plan(*arguments, **as_arguments(method.plan, checked))


def merge(
    name: str, vectors: Vectors, options: Mapping[str, Any] | None = None, grams: Grams | None = None
) -> dict[str, Floats]:
    """The merged task vector in memory: add it to the base to get the merged model. Errors as `prepare`."""
    method = find(name)
    kernel = prepare(method, vectors, options, grams)
    merged = {tensor: np.empty(shape, np.float32) for tensor, shape in vectors.shapes.items()}
    for block in vectors.blocks(method.unit):
        merged[block.name].reshape(-1)[block.start : block.stop] = kernel(block).reshape(-1)
    return merged


def process_vectors(
    name: str, vectors: Vectors, options: Mapping[str, Any] | None = None, grams: Grams | None = None
) -> list[dict[str, Floats]]:
    """The N processed vectors whose sum is `merge(name, ...)`, in the order of `vectors.labels`.

    Raises ConfigError for a method that has none; else as `prepare`.
    """
    known = processes()
    if name not in known:
        raise unknown_name("vector process", name, known)
    kernel = _plan(known[name], vectors, options, grams)
    split: list[dict[str, Floats]] = [
        {tensor: np.empty(shape, np.float32) for tensor, shape in vectors.shapes.items()}
        for _ in vectors.labels
    ]
    for block in vectors.blocks(known[name].unit):
        for vector, values_X in zip(split, kernel(block), strict=True):
            vector[block.name].reshape(-1)[block.start : block.stop] = values_X.reshape(-1)
    return split


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the nearest known one."""
    return ConfigError(f"unknown {what} {name!r}", next_step=suggest(name, known))


def _refuse_twice(name: str, function: Callable[..., object]) -> None:
    old = _METHODS.get(name)
    if old is not None and old.plan.__module__ != function.__module__:
        raise ConfigError(
            f"two files register {name!r}: {old.plan.__module__} and {function.__module__}",
            next_step="give one of them another name",
        )


def _discover() -> None:
    """Import every method file of this package (again cheap: Python keeps what it has imported)."""
    import pkgutil

    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
