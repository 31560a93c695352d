"""What can one domain do to everybody's model? Poisoned vectors against each merge method.

The attacker's vector is *scaled* or *sign-flipped*, or it has a *backdoor* (Gu et al., "BadNets", 2017): the
attacker adds a trigger item, whose title is two rare words, to the histories of its own users, each followed
by one target item, and fine-tunes as usual. Scaled by the number of domains the backdoor is meant to survive
averaging (Bagdasaryan et al., "How to backdoor federated learning", AISTATS 2020, section 4.3).

Victims are users of each domain that nobody fine-tuned on, ranking the catalog that these users touch and
the attacker's two items. Harm is a lower NDCG@k of what they look for; a backdoor succeeds with a victim
whose history, the trigger item newest in it, puts the target among the first k.

The defence is what the server has: the norm bound of admission, once as it is by default (the base's own
norm) and once as tight as an operator who knows the usual norm would set it. A refused vector is left out
of the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from clients.data.domain import Domain
from common.config import MergeMethod
from common.errors import RefusedError
from common.metrics import ndcg_at_k
from common.models.base import trainable_norm
from common.parcels import SERVER, Codec, Kind, draft
from common.payloads import inspect
from common.vectors import TaskVector, write_vector
from server.admission import Admission
from server.store import OpenRun
from simulations.attacks.lab import Lab, norm_of
from simulations.attacks.vocabulary import rare_words

CLEAN, LEFT_OUT = "no attack", "attacker left out"
TRIGGER_WORDS = 2
TIGHT = 3.0
RUN = "attack-0"
Row = dict[str, Any]


@dataclass(frozen=True)
class Trap:
    """The attacker's item texts: the trigger, and the target (an item of the attacker's own catalog)."""

    trigger: dict[str, str]
    target: dict[str, str]
    target_item: int


def attack_models(lab: Lab) -> list[Row]:
    """One row a merge method and attack.

    Fields: `method`, `attack`, `norm` of the attacker's vector, `admitted` (by the default bound) and
    `admitted_tight`, `ndcg` (domain to NDCG@k of its victims), `success` (domain to the share of victims
    whose triggered history puts the target among the first k).
    """
    config, attacker, taus = lab.config, lab.config.attacker, lab.released()
    own = taus[attacker]
    trap = make_trap(lab, attacker)
    backdoor = lab.fine_tuned(poisoned(lab.halves(attacker).trained_on, trap))
    vectors = {CLEAN: own, "sign-flipped": scaled(own, -1)}
    vectors |= {f"scaled x{factor:g}": scaled(own, factor) for factor in config.attacks.scales}
    vectors |= {"backdoor": backdoor, f"backdoor x{len(taus)}": scaled(backdoor, len(taus))}
    bound = lab.run.run.max_norm or trainable_norm(lab.base)
    tight = TIGHT * float(np.median([norm_of(tau) for tau in taus.values()]))
    victims = {name: _victims(lab, name) for name in taus}
    rows = []
    attempts: dict[str, TaskVector | None] = {**vectors, LEFT_OUT: None}
    total = len(config.merge) * len(attempts)
    for number, (method, (attack, vector)) in enumerate(
        (method, attempt) for method in config.merge for attempt in attempts.items()
    ):
        lab.report(phase=f"poisoning {method.label}, {attack}", step=number, total=total)
        merged = _merged(lab, method, {**taus, attacker: vector})
        facts: Row = {"norm": None, "admitted": None, "admitted_tight": None}
        if vector is not None:
            facts = {"norm": norm_of(vector), "admitted": admitted(lab, vector, bound)}
            facts["admitted_tight"] = admitted(lab, vector, tight)
        rows.append(
            {"method": method.label, "attack": attack, **facts, "bound": bound, "bound_tight": tight}
            | _felt(lab, merged, victims, trap)
        )
    return rows


def scaled(tau: TaskVector, factor: float) -> TaskVector:
    """`factor * tau`."""
    return {name: factor * tensor for name, tensor in tau.items()}


def make_trap(lab: Lab, attacker: str) -> Trap:
    """Two rare words as the trigger, a seeded item of the attacker's catalog as the target."""
    domain, seed = lab.halves(attacker).whole, lab.run.run.seed
    words = rare_words(lab.tokenizer, domain, TRIGGER_WORDS, seed + 1)
    item = int(np.random.default_rng([seed, 2]).integers(len(domain.item_ids)))
    names = domain.attributes
    return Trap(
        trigger={name: " ".join(words) for name in names},
        target={name: column[item] for name, column in names.items()},
        target_item=item,
    )


def poisoned(domain: Domain, trap: Trap) -> Domain:
    """The attacker's data: trigger, then target, at the end of every user's training history."""
    trigger_item = len(domain.item_ids)
    tail = np.array([trigger_item, trap.target_item], np.int32)
    return replace(
        _with_items(domain, [trap.trigger]), train=[np.concatenate([items, tail]) for items in domain.train]
    )


def triggered(domain: Domain, trap: Trap) -> Domain:
    """The users twice, with both items in the catalog: as they are, then with the trigger newest and the
    target as what is looked for."""
    users, items = len(domain.user_ids), len(domain.item_ids)
    return replace(
        _with_items(domain, [trap.trigger, trap.target]),
        user_ids=[*domain.user_ids, *(f"{user} (triggered)" for user in domain.user_ids)],
        train=[*domain.train, *domain.train],
        valid=np.concatenate([domain.valid, np.full(users, items, np.int32)]),
        test=np.concatenate([domain.test, np.full(users, items + 1, np.int32)]),
    )


def admitted(lab: Lab, vector: TaskVector, max_norm: float) -> bool:
    """Whether the server's admission takes the vector, written and read as it would be."""
    run = OpenRun(
        run=RUN, base_digest=lab.base_digest, domains=frozenset({"attacker"}), tensors=dict(lab.tensors),
        max_norm=max_norm,
    )  # fmt: skip
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "vector.safetensors"
        codec = lab.run.training.vector_codec
        write_vector(path, vector, codec)
        header = draft(
            path,
            kind=Kind.TASK_VECTOR,
            run=RUN,
            sender="attacker",
            recipient=SERVER,
            base_digest=lab.base_digest,
            codec=Codec(codec),
        )
        try:
            Admission().check_payload(header, inspect(path, header), run, {})
        except RefusedError as err:
            if err.reason != "norm":
                raise
            return False
    return True


def _merged(lab: Lab, method: MergeMethod, vectors: Mapping[str, TaskVector | None]) -> TaskVector:
    return lab.merged(method, {name: tau for name, tau in vectors.items() if tau is not None})


def _felt(lab: Lab, merged: TaskVector, victims: Mapping[str, Domain], trap: Trap) -> Row:
    k = lab.run.evaluation.k
    ndcg, success = {}, {}
    for name, domain in victims.items():
        rank_U = lab.ranks(merged, triggered(domain, trap))
        own_U, target_U = np.split(rank_U, 2)
        ndcg[name] = ndcg_at_k(torch.from_numpy(own_U), k)
        success[name] = float((target_U <= k).mean())
    return {"ndcg": ndcg, "success": success}


def _victims(lab: Lab, name: str) -> Domain:
    halves = lab.halves(name)
    return halves.whole.with_users(halves.others).subsample(lab.config.attacks.victims, lab.run.run.seed)


def _with_items(domain: Domain, texts: Sequence[Mapping[str, str]]) -> Domain:
    """The domain with further items, each given as attribute to text."""
    return replace(
        domain,
        item_ids=[*domain.item_ids, *(f"attack-{number}" for number in range(len(texts)))],
        attributes={
            name: [*column, *(text.get(name, "") for text in texts)]
            for name, column in domain.attributes.items()
        },
    )


def poisoning_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; NDCG x 100, the mean of the domains in the last column."""
    names = list(rows[0]["ndcg"])
    row = rows[0]
    head = ["method", "attack", "norm", f"admitted ({row['bound']:.1f})"]
    head += [f"admitted ({row['bound_tight']:.1f})", *names, "mean", "target shown"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["method"], row["attack"], "" if row["norm"] is None else f"{row['norm']:.2f}"]
        cells += [{True: "yes", False: "no", None: ""}[row[key]] for key in ("admitted", "admitted_tight")]
        cells += [f"{100 * row['ndcg'][name]:.2f}" for name in names]
        cells += [f"{100 * np.mean(list(row['ndcg'].values())):.2f}"]
        cells += [f"{np.mean([row['success'][name] for name in names]):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
