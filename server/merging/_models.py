"""The options of a method as a strict pydantic model. Imported only where one is needed: see `_options`."""

from __future__ import annotations

import functools
import typing
from typing import Any

from pydantic import ConfigDict, create_model

from common.config import Frozen
from server.merging._options import Function, as_arguments, defaults


class Options(Frozen):
    """Options of one method: every key is known and nothing is converted silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@functools.cache
def options_model(name: str, function: Function) -> type[Options]:
    """The model of the keyword-only parameters of `function`; each must have a default."""
    hints = typing.get_type_hints(function, include_extras=True)
    spelt = as_arguments(function, defaults(function))
    fields: dict[str, Any] = {key.removesuffix("_"): (hints[key], default) for key, default in spelt.items()}
    model: Any = create_model(f"{name} options", __base__=Options, **fields)
    return typing.cast("type[Options]", model)
