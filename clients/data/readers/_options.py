"""What a reader may be told beyond the path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.progress import NO_REPORT, Report


@dataclass(frozen=True)
class ReadOptions:
    """`items` overrides the item file; the columns are for the `columns` format only.

    `attributes` maps our attribute name to the column that holds it; empty takes every text column.
    """

    items: Path | None = None
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    file_order: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    report: Report = NO_REPORT
