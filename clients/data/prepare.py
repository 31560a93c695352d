"""`isthmus data prepare`: a source becomes a domain folder, or a named error and nothing changed.

The same files and settings give the same folder; `domain.json` records both (digests of the files, never
their contents).

    >>> prepare(Path("/nowhere"), Path("out"), "toys")
    Traceback (most recent call last):
    common.errors.DataError: /nowhere: no such file or folder
      next: check the path
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clients.data.assemble import Settings, Stage, assemble
from clients.data.domain import Domain
from clients.data.readers import ReadOptions, read
from clients.data.records import Issues
from common.catalog import check_name
from common.errors import DataError

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made: the domain, its folder, the stages of filtering, and what was dropped by kind."""

    domain: Domain
    folder: Path
    format: str
    stages: tuple[Stage, ...]
    dropped: dict[str, int]
    notes: tuple[str, ...]


def prepare(
    path: Path,
    out: Path,
    name: str,
    settings: Settings | None = None,
    *,
    format_name: str | None = None,
    options: ReadOptions | None = None,
    drop: Iterable[str] = (),
    users: int | None = None,
    seed: int = 0,
    replace_existing: bool = False,
) -> Prepared:
    """Read `path`, filter, split, and write the domain folder `out`.

    `drop` lists kinds of problems (`clients.data.records.KINDS`) whose rows are left out and counted; any
    other problem raises DataError at its first place. `users` draws a seeded subsample.
    """
    settings, options = settings or Settings(), options or ReadOptions()
    check_name(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not replace_existing:
        raise DataError(f"{out}: exists already", next_step="choose another --out, or add --replace")
    issues = Issues(drop)
    records = read(path, issues, options, format_name)
    made = assemble(name, records, settings, issues)
    provenance: dict[str, Any] = {
        "format": records.format,
        "settings": {**asdict(settings), "k_core": made.k_core, "drop": sorted(issues.tolerated)},
        "sources": [_source(file, options) for file in records.files],
        "stages": [asdict(stage) for stage in made.stages],
        "dropped": dict(sorted(issues.counts.items())),
    }
    domain = replace(made.domain, provenance=provenance)
    private_ids = made.private_ids
    if users is not None:
        domain = domain.subsample(users, seed)
        if private_ids is not None:
            private_ids = {item: private_ids[item] for item in domain.item_ids}
    domain.save(out, private_ids=private_ids)
    if private_ids is not None:
        issues.note("item ids are numbers or were asked to be opaque: the catalog uses invented ids")
    return Prepared(domain, out, records.format, made.stages, dict(issues.counts), tuple(issues.notes))


def _source(path: Path, options: ReadOptions) -> dict[str, Any]:
    digest, size_bytes, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            options.report(phase=f"digest {path.name}", step=done, total=size_bytes)
    return {"file": path.name, "bytes": size_bytes, "sha256": digest.hexdigest()}
