"""Which words were in the training data? From the rows of an embedding table, all of them; so none crosses.

The positive control is made here: the first domain's members are fine-tuned with the word embeddings
trained too, which nothing in the product does, after rare words that no public text has were planted in some
of their private titles. A row that AdamW only decayed is a multiple of the base's row; any other row is a
token of the data. The same reading of a vector that was released finds no table to read.

What the egress gate says to the control is shown, also where the table hides under another name and where
the owner's own idea of what may leave has been tampered with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from clients.data.domain import Domain
from clients.egress import EgressGate
from clients.policy import EgressPolicy
from clients.training.dataset import TrainingBatches
from clients.training.fit import load_encoder
from clients.training.leakage import Doubles
from clients.training.loss import TwoTower
from common.errors import DataError, GateError, IsthmusError
from common.ledger import Journal, Ledger
from common.models.base import is_table, load_tensors
from common.parcels import SERVER, Codec, Kind, draft
from common.signing import SigningKey
from common.vectors import TaskVector, subtract
from simulations.attacks.lab import Lab

PARALLEL = 0.1  # a row of which less than this share is not a multiple of the base's row has only decayed
RUN = "attack-0"
WORDS = "embeddings.word_embeddings.weight"
MIN_LETTERS = 5
Row = dict[str, Any]


def attack_vocabulary(lab: Lab) -> list[Row]:
    """One row for the control, one for each released vector, and what the gate says to the control."""
    name = lab.config.names[0]
    members = lab.halves(name).trained_on
    words = rare_words(lab.tokenizer, members, lab.config.attacks.planted_words, lab.run.run.seed)
    private = plant(members, words)
    control, seen = train_unfrozen(lab, private)
    base = load_tensors(lab.base)
    planted = set(lab.tokenizer.convert_tokens_to_ids(words))
    texts = list(chain.from_iterable(members.catalog().texts(lab.run.text.attributes)))
    public = set(chain.from_iterable(lab.tokenizer(texts)["input_ids"]))
    vectors = {"control: embeddings trained": control}
    vectors |= {f"released vector of {domain}": tau for domain, tau in lab.released().items()}
    rows = [_reading(label, tau, base, seen, planted, public) for label, tau in vectors.items()]
    return rows + refusals(lab, control)


def rare_words(tokenizer: Any, domain: Domain, count: int, seed: int) -> list[str]:
    """So many words of one token that no text of the domain has. Raises DataError if there are too few."""
    text = " ".join(chain.from_iterable(domain.attributes.values())).lower()
    known = sorted(tokenizer.get_vocab())
    free = [word for word in known if word.isascii() and word.isalpha() and len(word) >= MIN_LETTERS]
    free = [word for word in free if word.lower() not in text]
    if len(free) < count:
        raise DataError("the tokenizer has too few words that the texts do not use", next_step="plant fewer")
    return [str(word) for word in np.random.default_rng(seed).choice(free, count, replace=False)]


def plant(domain: Domain, words: Sequence[str]) -> Domain:
    """Each word at the head of a much-bought item's title: private texts that differ from the public ones."""
    title = domain.public_attributes[0]
    column = list(domain.attributes[title])
    counts_I = np.bincount(np.concatenate(domain.train), minlength=len(column))
    for word, item in zip(words, np.argsort(-counts_I, kind="stable"), strict=False):
        column[item] = f"{word} {column[item]}"
    return replace(domain, attributes={**domain.attributes, title: column})


def train_unfrozen(lab: Lab, domain: Domain) -> tuple[TaskVector, Counter[int]]:
    """The vector of a fine-tuning that trains the word embeddings too, and how often it saw each token."""
    training, steps = lab.run.training, lab.config.attacks.vocabulary_steps
    encoder = load_encoder(lab.base, lab.run)
    batches = TrainingBatches(encoder, domain, lab.run, steps)
    tower = TwoTower(encoder, {*lab.tensors, WORDS}, training.temperature)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, training.learning_rate, weight_decay=training.weight_decay)
    seen: Counter[int] = Counter()
    encoder.model.train()
    for step in range(steps):
        lab.report(phase="vocabulary: control", step=step, total=steps)
        batch = batches[step]
        for side in ("history", "item"):
            ids, mask = (batch[key] for key in batch if key.startswith((f"{side}_ids", f"{side}_mask")))
            seen.update(ids[mask.bool()].tolist())
        optimizer.zero_grad()
        tower(**batch)["loss"].backward()
        optimizer.step()
    return subtract(tower.trained_tensors(), load_tensors(lab.base)), seen


def touched_rows(delta_RE: torch.Tensor, base_RE: torch.Tensor) -> tuple[set[int], Doubles]:
    """Rows that did more than decay, and how far each row moved besides: [R].

    Weight decay makes of a row a multiple of itself, so what is not parallel to the base's row was learned.
    """
    delta_RE, base_RE = delta_RE.double(), base_RE.double()
    share_R = (delta_RE * base_RE).sum(1) / base_RE.square().sum(1).clamp(min=1e-30)
    moved_R = (delta_RE - share_R[:, None] * base_RE).norm(dim=1)
    touched_R = moved_R > PARALLEL * delta_RE.norm(dim=1)
    return set(torch.nonzero(touched_R)[:, 0].tolist()), moved_R.numpy()


def refusals(lab: Lab, control: TaskVector) -> list[Row]:
    """What the egress gate says when the control is to leave, in three disguises."""
    table = next(name for name in control if is_table(name))
    renamed = {name.replace(table, "encoder.extra.weight"): tensor for name, tensor in control.items()}
    tampered = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    tries: dict[str, tuple[TaskVector, Mapping[str, tuple[int, ...]]]] = {
        "gate: the table by its name": (control, lab.tensors),
        "gate: the table under another name": (renamed, lab.tensors),
        "gate: the same, the owner's list of tensors tampered with": (renamed, tampered),
    }
    return [
        {"model": label, "refusal": _offer(lab, vector, allowed)}
        for label, (vector, allowed) in tries.items()
    ]


def _offer(lab: Lab, vector: TaskVector, allowed: Mapping[str, tuple[int, ...]]) -> str:
    """Ask a gate of its own to release the vector: what it refused with, or "" if it let it pass."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ledger, journal = Ledger(folder / "ledger.jsonl"), Journal(folder / "journal.jsonl")
        key = SigningKey.generate(folder / "identity.key")
        gate = EgressGate(EgressPolicy(), key, ledger, journal, folder / "outbox", sender="owner")
        gate.agree(RUN, lab.base_digest, allowed)
        payload = folder / "vector.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in vector.items()}, payload)
        try:
            header = draft(
                payload,
                kind=Kind.TASK_VECTOR,
                run=RUN,
                sender="owner",
                recipient=SERVER,
                base_digest=lab.base_digest,
                codec=Codec.FP32,
            )
            gate.release(header, payload)
        except GateError as err:
            return err.message
        except IsthmusError as err:
            return f"{err.code}: {err.message}"
    return ""


def _reading(
    label: str,
    vector: TaskVector,
    base: Mapping[str, torch.Tensor],
    seen: Counter[int],
    planted: set[int],
    public: set[int],
) -> Row:
    """How well the tokens that were `seen` are recovered from the tables of `vector`."""
    tables = [
        name for name, tensor in vector.items() if is_table(name) or tensor.shape[:1] == base[WORDS].shape[:1]
    ]
    found: set[int] = set()
    rank = None
    for name in tables:
        touched, moved_R = touched_rows(vector[name], base[name])
        found |= touched
        both = sorted(touched & set(seen))
        rank = _spearman(moved_R[both], np.array([seen[token] for token in both], np.float64))
    right = len(found & set(seen))
    return {
        "model": label,
        "tables": len(tables),
        "seen": len(seen),
        "found": len(found),
        "precision": right / len(found) if found else None,
        "recall": right / len(seen),
        "planted": len(planted),
        "planted_found": len(found & planted),
        "found_not_public": len(found - public),
        "frequency_rank_correlation": rank,
    }


def _spearman(left: Doubles, right: Doubles) -> float:
    """Rank correlation, equal values sharing their mean rank."""

    def ranked(values: Doubles) -> Doubles:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        mean_rank: Doubles = ((ends - counts + ends + 1) / 2)[inverse]
        return mean_rank

    return float(np.corrcoef(ranked(left), ranked(right))[0, 1])


def vocabulary_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: what was recovered, then what the gate said."""
    head = ["vector", "tables", "tokens seen", "found", "precision", "recall", "planted words found"]
    head += ["found outside public texts", "norm against frequency (Spearman)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "refusal" not in row:
            precision, rank = row["precision"], row["frequency_rank_correlation"]
            cells = [
                row["model"],
                row["tables"],
                row["seen"],
                row["found"],
                "" if precision is None else f"{precision:.4f}",
                f"{row['recall']:.4f}",
                f"{row['planted_found']} of {row['planted']}",
                row["found_not_public"],
                "" if rank is None else f"{rank:.2f}",
            ]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    lines += ["", "| the control at the egress gate | refused |", "|---|---|"]
    lines += [f"| {row['model']} | {row['refusal'] or 'PASSED'} |" for row in rows if "refusal" in row]
    return "\n".join(lines) + "\n"
