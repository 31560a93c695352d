"""Labelled prompts in a file: JSON lines, each `{"prompt": "...", "answer": "..."}`.

With `"others": ["...", ...]`, wrong answers to the same prompt, a sample asks for a choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError


class Sample(NamedTuple):
    """A prompt, its answer, and other answers that it might have had; without any it asks for no choice.

    An answer that ends in a line break is the first of several: behind it no end of the text is looked for.
    """

    prompt: str
    answer: str
    others: tuple[str, ...] = ()


def ask_for_choice(samples: Sequence[Sample]) -> bool:
    """Whether they do. Raises DataError where some do and some do not: their losses would not compare."""
    choices = sum(bool(sample.others) for sample in samples)
    if choices not in (0, len(samples)):
        raise DataError(
            f"{choices} of {len(samples)} samples have other answers (`others`)",
            next_step="give them to all samples or to none",
        )
    return choices > 0


def read_samples(path: Path) -> list[Sample]:
    """The samples of `path` in their order.

    Raises DataError naming file and line, for none at all, and where only some have `others`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: not a readable UTF-8 file", next_step="check the path") from None
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        keys = ("prompt", "answer")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            raise DataError(
                f"{path}, line {number}: expected a JSON object with the texts `prompt` and `answer`",
                next_step="mend that line",
            )
        if not (record["prompt"].strip() and record["answer"].strip()):
            raise DataError(f"{path}, line {number}: prompt or answer is empty", next_step="leave it out")
        samples.append(Sample(record["prompt"], record["answer"], _others(record, f"{path}, line {number}")))
    if not samples:
        raise DataError(f"{path}: no samples", next_step="give a few hundred labelled prompts")
    try:
        ask_for_choice(samples)
    except DataError as err:
        raise DataError(f"{path}: {err.message}", next_step=err.next_step) from None
    return samples


def _others(record: dict[str, Any], where: str) -> tuple[str, ...]:
    others = record.get("others", [])
    if not isinstance(others, list) or not all(isinstance(one, str) and one.strip() for one in others):
        raise DataError(f"{where}: `others` is not a list of texts", next_step="mend that line")
    if len({record["answer"], *others}) < 1 + len(others):
        raise DataError(f"{where}: an answer occurs twice", next_step="leave it out of `others`")
    return tuple(others)
