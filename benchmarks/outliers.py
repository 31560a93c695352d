"""What `server.outliers` marks when one of several honest vectors is tampered with.

Each vector in turn is flipped in sign or scaled, the others stay; a mark on the tampered one is a hit, a mark
on another a false alarm. Without vectors it makes toy ones with a common part.

    python -m benchmarks.outliers
    python -m benchmarks.outliers beauty=a.safetensors toys=b.safetensors ... --out runs/outliers.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measure import machine, show, write_record
from common.vectors import write_vector
from server.outliers import survey

FACTORS = {"as it is": 1.0, "flipped": -1.0, "x 1.5": 1.5, "x 3": 3.0, "x 10": 10.0}
TOY = {"encoder.layer.0.weight": (48, 32), "encoder.layer.1.weight": (48, 32)}


def toys(folder: Path, count: int = 5) -> dict[str, Path]:
    """Random vectors with a common part, so that their cosines are about 0.5."""
    common = {name: torch.randn(shape, generator=_seeded(99)) for name, shape in TOY.items()}
    files = {}
    for number in range(count):
        own = {name: torch.randn(shape, generator=_seeded(number)) for name, shape in TOY.items()}
        files[f"d{number}"] = folder / f"d{number}.safetensors"
        write_vector(files[f"d{number}"], {name: common[name] + own[name] for name in TOY}, "fp32")
    return files


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attack(files: dict[str, Path], name: str, factor: float, folder: Path) -> dict[str, Any]:
    """What is marked when the vector of `name` is multiplied by `factor`."""
    changed = folder / "changed.safetensors"
    tau = {tensor: factor * values.float() for tensor, values in load_file(files[name]).items()}
    write_vector(changed, tau, "fp32")
    found = survey({**files, name: changed})["vectors"]
    marks = {domain: facts["stands_out"] for domain, facts in found.items()}
    return {
        "hit": bool(marks[name]),
        "false_alarms": sum(bool(marks[other]) for other in files if other != name),
        "norm_score": found[name]["norm_score"],
        "cosine_to_others": found[name]["cosine_to_others"],
        "cosine_score": found[name]["cosine_score"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vectors", nargs="*", help="NAME=FILE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = dict(pair.split("=", 1) for pair in options.vectors)
        files = {name: Path(path) for name, path in given.items()} or toys(folder)
        rows = []
        for what, factor in FACTORS.items():
            found = {name: attack(files, name, factor, folder) for name in files}
            hits = sum(row["hit"] for row in found.values())
            alarms = sum(row["false_alarms"] for row in found.values())
            row = {"changed": what, "of": len(files), "hits": hits, "false_alarms": alarms}
            rows.append({**row, "each": found})
    heads = ("changed", "hits", "of", "false_alarms")
    show("Vectors that stand out", heads, [[row[head] for head in heads] for row in rows])
    write_record(options.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
