"""What the options of a method may be.

A method's keyword-only parameters say it: their annotations, with `Bounds` for numbers. Options that are
plainly right are taken as they are; only where something has to be explained, or a model of the options is
asked for, is pydantic imported (with `_models`), because that takes longer than a small merge.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Function = Callable[..., object]


@dataclass(frozen=True)
class Bounds:
    """A finite number, above `gt`, at least `ge`, below `lt`, at most `le`."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def allows(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        schema = dict(handler(source))
        if schema["type"] == "float":
            schema["allow_inf_nan"] = False
        return schema | {key: value for key, value in vars(self).items() if value is not None}


Density = Annotated[float, Bounds(gt=0, le=1)]
Probability = Annotated[float, Bounds(ge=0, lt=1)]
Weight = Annotated[float, Bounds()]


def defaults(function: Function) -> dict[str, Any]:
    """Every option of `function` with its default, by the option's name."""
    return {
        key.removesuffix("_"): parameter.default
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def as_arguments(function: Function, options: Mapping[str, Any]) -> dict[str, Any]:
    """Option names as the function's parameters spell them (`lambda` becomes `lambda_`)."""
    parameters = inspect.signature(function).parameters
    return {f"{key}_" if f"{key}_" in parameters else key: value for key, value in options.items()}


def resolve(name: str, function: Function, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of method `name`, checked. Raises ConfigError with the nearest known key."""
    known = defaults(function)
    if options:
        hints = typing.get_type_hints(function, include_extras=True)
        spelt = as_arguments(function, options)
        if not all(key in known for key in options) or not all(
            _is_plain(hints[key], value) for key, value in spelt.items()
        ):
            from common.config import validate
            from server.merging._models import options_model

            found = validate(dict(options), options_model(name, function), where=f"merge method {name!r}")
            return found.model_dump()
    return {key: _typed(options.get(key, default), default) for key, default in known.items()}


def _is_plain(hint: Any, value: Any) -> bool:
    """Whether `value` is right beyond doubt; False sends it to pydantic."""
    bounds: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        bounds = tuple(rest)
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint) and not bounds
    kinds = {float: (float, int), int: (int,), bool: (bool,), str: (str,)}
    if type(value) not in kinds.get(hint, ()) or not all(isinstance(bound, Bounds) for bound in bounds):
        return False
    return all(bound.allows(value) for bound in bounds) if bounds else hint is not float


def _typed(value: Any, default: Any) -> Any:
    """Whole numbers given for a float option as floats, as pydantic gives them."""
    return float(value) if isinstance(default, float) and type(value) is int else value
