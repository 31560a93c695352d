"""Labelled prompts in a file: JSON lines, each `{"prompt": "...", "answer": "..."}`."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import DataError

Sample = tuple[str, str]  # a prompt and its answer


def read_samples(path: Path) -> list[Sample]:
    """The samples of `path` in their order. Raises DataError naming file and line, and for none at all."""
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
        samples.append((record["prompt"], record["answer"]))
    if not samples:
        raise DataError(f"{path}: no samples", next_step="give a few hundred labelled prompts")
    return samples
