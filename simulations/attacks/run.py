"""Carry out the attacks and write their tables: `out/ATTACK.md` and `out/ATTACK.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, suggest
from common.files import write_atomic
from common.progress import NO_REPORT, Report
from server.merge import check_method
from simulations.attacks.config import AttackConfig
from simulations.attacks.lab import Lab
from simulations.attacks.membership import attack_membership, membership_table
from simulations.attacks.poisoning import attack_models, poisoning_table
from simulations.attacks.privacy import attack_private, privacy_table
from simulations.attacks.vocabulary import attack_vocabulary, vocabulary_table

PHASE = "attacks"
Attack = Callable[[Lab], list[dict[str, Any]]]
Table = Callable[[Sequence[dict[str, Any]]], str]
ATTACKS: Mapping[str, tuple[Attack, Table]] = {
    "membership": (attack_membership, membership_table),
    "vocabulary": (attack_vocabulary, vocabulary_table),
    "poisoning": (attack_models, poisoning_table),
    "privacy": (attack_private, privacy_table),
}


def run_attacks(
    config: AttackConfig, out: Path, names: Sequence[str] = (), report: Report = NO_REPORT
) -> list[Path]:
    """Carry out the attacks `names` in the folder `out`; returns the paths of the tables.

    No names: all, without `privacy` where no epsilons are given.

    Raises ConfigError, and what fine-tuning, merging and evaluation raise.
    """
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"unknown attack {name!r}", next_step=suggest(name, ATTACKS))
    for method in config.merge:
        check_method(method)
    lab = Lab(config, out, report)
    chosen = list(names) or [name for name in ATTACKS if name != "privacy" or config.attacks.epsilons]
    paths = []
    for number, name in enumerate(chosen):
        report(phase=PHASE, step=number, total=len(chosen))
        started_s = time.monotonic()
        attack, table = ATTACKS[name]
        rows = attack(lab)
        record = {
            "schema": 1,
            "attack": name,
            "seed": config.run.seed,
            "config": config.model_dump(mode="json"),
            "seconds": round(time.monotonic() - started_s, 1),
            "rows": rows,
        }
        write_atomic(out / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
        paths.append(out / f"{name}.md")
        write_atomic(paths[-1], table(rows).encode())
    report(phase=PHASE, step=len(chosen), total=len(chosen))
    return paths
