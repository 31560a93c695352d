"""Training-free merge methods: a registry, and one file a method.

A method is a small typed function of N task vectors and its options that returns the merged task
vector (add it to the base to get the merged model). Adding one means adding one file here:

    @merge_method("median", paper="...", equation="tau = median_d tau_d")
    def median(taus: Sequence[TaskVector], *, lambda_: Weight = 1.0) -> TaskVector: ...

The keyword-only parameters are the options; their annotations say what is allowed, and a trailing
underscore (for Python's own words) is not part of the option's name. Every call, by name or direct,
checks options and vectors first: same tensor names and shapes, floating point, finite.

A *process* changes the vectors one by one before coefficients are learned on them (TIES: trimmed, with
conflicts removed); `initial` is the coefficient at which the processed vectors start.

Modules whose name starts with an underscore are helpers. Vectors are on the CPU; results are fp32.

    >>> sorted(methods())
    ['task-arithmetic', 'ties', 'weight-averaging']
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import torch
from pydantic import ConfigDict, Field, create_model

from common.config import Frozen, validate
from common.errors import ConfigError, VectorError
from common.vectors import TaskVector

P = ParamSpec("P")
R = TypeVar("R")

Density = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class Options(Frozen):
    """Options of one method, made from its function's keyword-only parameters; no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Method:
    """One registered training-free method."""

    name: str
    paper: str
    equation: str
    function: Callable[..., TaskVector]
    options: type[Options]


@dataclass(frozen=True)
class Process:
    """One registered way to prepare vectors for learned coefficients, which start at `initial`."""

    name: str
    initial: float
    function: Callable[..., list[TaskVector]]
    options: type[Options]


_METHODS: dict[str, Method] = {}
_PROCESSES: dict[str, Process] = {}


def merge_method(
    name: str, *, paper: str, equation: str
) -> Callable[
    [Callable[Concatenate[Sequence[TaskVector], P], TaskVector]],
    Callable[Concatenate[Sequence[TaskVector], P], TaskVector],
]:
    """Register the function as method `name`; `paper` and `equation` say what it computes."""

    def register(
        function: Callable[Concatenate[Sequence[TaskVector], P], TaskVector],
    ) -> Callable[Concatenate[Sequence[TaskVector], P], TaskVector]:
        options = _options_model(name, function)
        checked = _checked(name, function, options)
        _refuse_twice(name, function, _METHODS.get(name))
        _METHODS[name] = Method(name, paper, equation, checked, options)
        return checked

    return register


def vector_process(
    name: str, *, initial: float
) -> Callable[
    [Callable[Concatenate[Sequence[TaskVector], P], list[TaskVector]]],
    Callable[Concatenate[Sequence[TaskVector], P], list[TaskVector]],
]:
    """Register the function as a process `name` of vectors for learned coefficients."""

    def register(
        function: Callable[Concatenate[Sequence[TaskVector], P], list[TaskVector]],
    ) -> Callable[Concatenate[Sequence[TaskVector], P], list[TaskVector]]:
        options = _options_model(name, function)
        checked = _checked(name, function, options)
        _refuse_twice(name, function, _PROCESSES.get(name))
        _PROCESSES[name] = Process(name, initial, checked, options)
        return checked

    return register


def methods() -> dict[str, Method]:
    """Every training-free method by name, found in this package's files."""
    _discover()
    return dict(_METHODS)


def processes() -> dict[str, Process]:
    """Every process of vectors by name, found in this package's files."""
    _discover()
    return dict(_PROCESSES)


def merge(name: str, taus: Sequence[TaskVector], options: Mapping[str, Any] | None = None) -> TaskVector:
    """Merge `taus` by the method `name`.

    Raises ConfigError for an unknown method (with the nearest) or option, VectorError for bad vectors.
    """
    known = methods()
    if name not in known:
        raise unknown_name("merge method", name, known)
    return known[name].function(taus, **_as_arguments(known[name].function, dict(options or {})))


def unknown_name(what: str, name: str, known: typing.Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"unknown {what} {name!r}", next_step=hint)


def check_vectors(taus: Sequence[TaskVector], labels: Sequence[str] | None = None) -> None:
    """Refuse vectors that cannot be merged. Raises VectorError naming the vector and the tensor."""
    if not taus:
        raise VectorError("no task vectors to merge", next_step="give at least one domain's vector")
    names = list(labels) if labels is not None else [f"{i + 1} of {len(taus)}" for i in range(len(taus))]
    first = taus[0]
    if not first:
        raise VectorError(f"task vector {names[0]} has no tensors", next_step="send it again")
    for label, tau in zip(names, taus, strict=True):
        if different := sorted(first.keys() ^ tau.keys()):
            side = "has no" if different[0] in first else "has an extra"
            raise VectorError(
                f"task vector {label} {side} tensor {different[0]!r}",
                next_step="merge only vectors of the same base and the same trainable tensors",
            )
        for name, tensor in tau.items():
            _check_tensor(label, name, tensor, first[name].shape)


def _check_tensor(label: str, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise VectorError(
            f"task vector {label}, tensor {name!r}: expected shape {list(shape)}, got {list(tensor.shape)}",
            next_step="merge only vectors of the same base",
        )
    if not tensor.is_floating_point():
        raise VectorError(
            f"task vector {label}, tensor {name!r}: expected floating point, got {tensor.dtype}",
            next_step="leave tensors that are not trained out of the vector",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise VectorError(
            f"task vector {label}, tensor {name!r}: holds NaN or infinite values",
            next_step="ask the domain to fine-tune again; its training diverged",
        )


def _checked(
    name: str, function: Callable[Concatenate[Sequence[TaskVector], P], R], options: type[Options]
) -> Callable[Concatenate[Sequence[TaskVector], P], R]:
    """The function behind a check of its options and its vectors."""

    @functools.wraps(function)
    def checked(taus: Sequence[TaskVector], *args: P.args, **kwargs: P.kwargs) -> R:
        given = {key.removesuffix("_"): value for key, value in kwargs.items()}
        validate(given, options, where=f"merge method {name!r}")
        check_vectors(taus)
        return function(taus, *args, **kwargs)

    return typing.cast("Callable[Concatenate[Sequence[TaskVector], P], R]", checked)


def _options_model(name: str, function: Callable[..., object]) -> type[Options]:
    """A strict model of the keyword-only parameters of `function`; each must have a default."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key.removesuffix("_"): (hints[key], parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    model: type[Options] = create_model(f"{name} options", __base__=Options, **fields)
    return model


def _as_arguments(function: Callable[..., object], options: dict[str, Any]) -> dict[str, Any]:
    """Option names as the function's parameters spell them (`lambda` becomes `lambda_`)."""
    parameters = inspect.signature(function).parameters
    return {f"{key}_" if f"{key}_" in parameters else key: value for key, value in options.items()}


def process_vectors(
    name: str, taus: Sequence[TaskVector], options: Mapping[str, Any] | None = None
) -> list[TaskVector]:
    """Prepare `taus` by the process `name`. Errors as `merge`."""
    known = processes()
    if name not in known:
        raise unknown_name("vector process", name, known)
    return known[name].function(taus, **_as_arguments(known[name].function, dict(options or {})))


def _refuse_twice(name: str, function: Callable[..., object], old: Method | Process | None) -> None:
    if old is not None and inspect.getmodule(old.function) is not inspect.getmodule(function):
        raise ConfigError(
            f"two files register {name!r}: {old.function.__module__} and {function.__module__}",
            next_step="give one of them another name",
        )


def _discover() -> None:
    """Import every method file of this package (again cheap: Python keeps what it has imported)."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
