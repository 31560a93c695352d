"""What may stand in the options of learned methods and of `auto`; how candidates of `auto` are written."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from common.coefficients import Granularity
from common.config import MergeMethod, validate
from common.errors import ConfigError
from server.learning.confluence import CONFLUENCE, ConfluenceOptions
from server.learning.losses import LOSSES
from server.learning.optimise import PLAIN
from server.merging import methods, processes
from server.merging._models import Options

AUTO = "auto"
AUTO_PAPER = "Isthmus: chosen on held-back pseudo-users by agreement with the teachers"
DEFAULT_CANDIDATES = (
    "weight-averaging",
    "task-arithmetic lambda=0.2",
    "task-arithmetic lambda=0.3",
    "task-arithmetic lambda=0.5",
    "ties",
    "tsv-merge",
    "iso-c",
    "confluence",
)


class AutoOptions(Options):
    """Options of `auto`. `candidates` is empty or a list as `parse_candidates` reads it."""

    candidates: str = ""
    margin: Annotated[float, Field(ge=0, le=1)] = 0.02
    target: Literal["ensemble", "own"] = "own"


def learned_options(process: str) -> type[Options]:
    """The options of a learned method: granularity, process, and those of the process."""
    fields: dict[str, Any] = {
        "granularity": (Granularity, "layer"),
        "process": (Literal[PLAIN, *sorted(processes())], PLAIN),
    }
    if process in processes():
        for name, field in processes()[process].options.model_fields.items():
            fields[name] = (field.annotation, field)
    model: type[Options] = create_model("learned merge options", __base__=Options, **fields)
    return model


def check_learned(method: MergeMethod, where: str, check: Callable[[MergeMethod], object]) -> dict[str, Any]:
    """The options of a learned method or of `auto`, checked and complete; `check` checks its candidates."""
    if method.method == CONFLUENCE:
        return validate(method.options, ConfluenceOptions, where=where).model_dump(mode="json")
    if method.method != AUTO:
        model = learned_options(str(method.options.get("process", PLAIN)))
        return validate(method.options, model, where=where).model_dump(mode="json")
    options = validate(method.options, AutoOptions, where=where).model_dump(mode="json")
    options["candidates"] = options["candidates"] or default_candidates()
    for candidate in parse_candidates(options["candidates"]).values():
        check(candidate)
    return options


def default_candidates() -> str:
    """The candidates of `auto` when none are named: those of the usual methods that are installed."""
    known = [*methods(), *LOSSES, CONFLUENCE]
    return ", ".join(text for text in DEFAULT_CANDIDATES if text.split()[0] in known)


def parse_candidates(text: str) -> dict[str, MergeMethod]:
    """Candidates by how they are written: `"ties density=0.3, task-arithmetic lambda=0.2"`.

    Between commas stand a method and its options. Only the form is checked here. Raises ConfigError.
    """
    found: dict[str, MergeMethod] = {}
    for part in text.split(","):
        name, *pairs = part.split() or [""]
        options = dict(_option(pair, part) for pair in pairs)
        label = " ".join([name, *pairs])
        if not name or name == AUTO or label in found:
            raise ConfigError(
                f"merge method 'auto': no candidate can be {label!r}, or it stands there twice",
                next_step='write candidates as "ties density=0.3, task-arithmetic lambda=0.2"',
            )
        folder = f"{len(found):02d}-{label.replace(' ', '-').replace('=', '-').lower()}"[:40]
        found[label] = MergeMethod(method=name, name=folder, options=options)
    return found


def _option(pair: str, where: str) -> tuple[str, float | int | str | bool]:
    key, equals, text = pair.partition("=")
    if not key or not equals or not text:
        raise ConfigError(
            f"merge method 'auto', candidate {where.strip()!r}: {pair!r} is no option",
            next_step="write options as key=value, without spaces around the sign",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a word
    return key, value if isinstance(value, int | float | str | bool) else text
