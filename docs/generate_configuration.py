"""Write `docs/configuration.md` from the configuration models themselves.

    python docs/generate_configuration.py

Defaults and allowed values are read from the pydantic models; what a key means stands here, beside the
model's own description where it has one. A key without a meaning, or a meaning without a key, is an error.
tests/unit/test_docs.py fails when the page that is checked in differs from what this writes.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pydantic_core
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clients.home import ClientConfig
from clients.policy import EgressPolicy
from common.config import ADAPTER_MERGES, REFERENCE_LEARNING, RunConfig
from server.home import ServerConfig
from server.language.registry import METHODS
from server.learning.confluence import CONFLUENCE, ConfluenceOptions
from server.learning.options import AUTO, AutoOptions, default_candidates
from server.merge import LEARNED_PAPERS
from server.merging import methods, processes
from simulations.attacks.config import AttackConfig
from simulations.config import SimulationConfig

PAGE = Path(__file__).with_name("configuration.md")
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

RUN_MEANINGS = {
    "run.name": "How the run is called; its id is this name and eight hexadecimal digits.",
    "run.seed": "Seed of training, of pseudo-users, and of every subsample.",
    "base.model": "`embedded` (all-MiniLM-L6-v2, installed with Isthmus) or the path of a folder in Hugging "
    "Face layout on the server. Owners choose their own copy; only its digest must be equal.",
    "base.pooling": "How token vectors become one vector; `auto` follows the folder's own setting.",
    "text.attributes": "Item attributes that make an item's text, in this order; absent ones are skipped.",
    "text.max_attribute_tokens": "Each attribute is cut to so many tokens.",
    "text.max_history_items": "At most so many items of a history are used.",
    "training.batch_size": "Positions in one step; the other targets of the batch are the negatives.",
    "training.learning_rate": "Peak learning rate of AdamW.",
    "training.temperature": "Scores are divided by it before the softmax.",
    "training.weight_decay": "Of AdamW.",
    "training.warmup_steps": "Steps in which the learning rate rises; afterwards it falls linearly.",
    "training.max_steps": "Optimiser steps at most.",
    "training.eval_every_steps": "Steps between two evaluations on the validation set.",
    "training.patience": "Early stopping.",
    "training.checkpoint_every_steps": "Steps between two checkpoints; killed training goes on from there.",
    "training.positions_per_user": "Train on every position of a history, or on its last one only.",
    "training.precision": "`auto` is bf16 where the hardware has it.",
    "training.vector_codec": "Number format of every vector that crosses, in both directions.",
    "privacy.mechanism": "`dp-sgd` trains with [differential privacy](privacy.md) of each user; an option.",
    "learning.preset": "`reference` fills every key that is not given with the authors' value, see below.",
    "learning.steps": "Steps of Adam on the coefficients.",
    "learning.batch_size": "Pseudo-users in one step.",
    "learning.learning_rate": "Of Adam, on the coefficients.",
    "learning.initial": "Coefficient to start from.",
    "learning.temperature": "Of the softmax over items, for student and teacher.",
    "learning.distillation_weight": "Weight of the distillation loss.",
    "learning.target": "Whose scores are distilled: those of the domain's own teacher, or the average of all "
    "teachers' (`ensemble`: every teacher encodes every catalog).",
    "learning.item_embeddings": "Whether the merged model's item embeddings are encoded once, or again.",
    "learning.refresh_every_steps": "Steps between two encodings when `item_embeddings` is `refreshed`.",
    "learning.mask_seen": "Leave the pseudo-user's own items out of student and teacher scores.",
    "learning.history_length": "Items in a pseudo-user's history.",
    "learning.rollout_top_k": "Only with `history_length` above 1.",
    "learning.rollout_temperature": "Only with `history_length` above 1: how evenly it is drawn.",
    "learning.holdout": "Held-back pseudo-users say which coefficients were the best, and when to stop; with "
    "0 the last ones are taken.",
    "learning.holdout_items": "A random part of the catalog is enough to compare coefficients.",
    "learning.evaluate_every_steps": "Steps between two looks at the held-back loss.",
    "learning.patience": "Early stopping.",
    "learning.precision": "`auto` is bf16 where the hardware has it.",
    "learning.vectors": "How vectors are kept while coefficients are learned; `bf16` halves their memory.",
    "merge[].method": "Name of the method, see below.",
    "merge[].name": "Label in tables, and what `publish` refers to; empty: method, then granularity.",
    "merge[].options": "Options of the method, see below.",
    "merge[].learning": "A learning section for this entry alone, for learned methods.",
    "evaluation.k": "Metrics are Recall@k and NDCG@k; with `[instruction]` it is 3, or 1. An owner's policy "
    "allows metrics by name: with a k that it does not name nothing is reported until the owner allows it.",
    "evaluation.max_users": "Evaluate at most so many test users, drawn by `run.seed`.",
    "evaluation.batch_size": "Histories encoded at once.",
    "lora.rank": "Columns of each B and rows of each A.",
    "lora.alpha": "The update is `alpha / rank * B A`.",
    "instruction.candidates": "Titles in a prompt: the next item, and others that the user never had.",
}
SIMULATION_MEANINGS = {
    "simulation.joint_steps": "Training steps of that reference.",
    "domain[].name": "The domain's name; letters, digits, `-` and `_`.",
    "domain[].path": "What `isthmus data prepare` reads, or a prepared folder; relative to this file.",
    "domain[].format": "As `isthmus data prepare --format`.",
    "domain[].k_core": "As `isthmus data prepare --k-core`.",
    "domain[].public": "Public attributes, as `isthmus data prepare --public`.",
}
CLIENT_MEANINGS = {
    "domain": "This domain's name at the server. Written by `isthmus client join`.",
    "pseudonym": "The name under which this domain appears in what is published. Written by join.",
    "server.name": "The server's name. This and the next four come from the join kit.",
    "server.fleet": "`host:port` of the control channel.",
    "server.exchange": "`host:port` of the data channel.",
    "server.enrol": "`host:port` of enrolment.",
    "server.public_key": "The server's Ed25519 key; what the server signs is checked by it.",
    "server.retired_log_keys": "Log keys that the server had before (isthmus client server-keys).",
    "server.log_key": "The server's Ed25519 key that signs the checkpoints of its ledger.",
    "base": "Its digest must be that of the run, or the run is refused.",
    "approved_fabs": "SHA-256 of the app bundles that the runner answers to; join writes the kit's. "
    "A bundle is compared, never unpacked.",
    "supernode_port": "Loopback port of the SuperNode; one for each owner's home on a host.",
}
SERVER_MEANINGS = {
    "name": "The server's name; lower-case letters, digits and `-`.",
    "hosts": "All are in the TLS certificate, and the first is written into kits.",
    "ports.fleet": "Public: control channel, the Fleet proxy in front of Flower's SuperLink.",
    "ports.exchange": "Public: data channel, the Exchange gRPC service.",
    "ports.enrol": "Public: enrolment, needed only while domains join.",
    "ports.superlink": "Loopback only, whatever `bind` says.",
}

HEAD = """\
# Configuration

This page is generated by `docs/generate_configuration.py` from the configuration models. Do not edit it.

All files are TOML. An unknown key is refused with the nearest known one; nothing is evaluated, and no
environment variable changes a value. The resolved configuration, defaults included, is saved beside every
result (`config.json`, and `config` in `summary.json`). Units are in the names: `_steps`, `_minutes`,
`_tokens`, `_bytes`. "not set" means that the key is left out.

Two environment variables name home directories, so that `--home` may be left out:
`ISTHMUS_SERVER_HOME` (default `~/.isthmus/server`) and `ISTHMUS_CLIENT_HOME` (default `~/.isthmus/client`).
"""

AUTO_TEXT = """
`auto` merges by every one of its `candidates` (methods and their options, separated by commas; empty:
`{candidates}`), scores each on the held-back pseudo-users, and takes the best average among those that are
in no domain more than `margin` below the best. The score is NDCG@10 of the merge's ranking against the 10
items that the teachers like best: the average of all teachers (`target = "ensemble"`) or the domain's own
(`"own"`). It is a proxy: no user is seen, agreement with the teachers is what is measured, and a merge that
is better than they are can only lose by it. `facts` in `merge.json` has the table and the reason."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of `model` by its dotted name; `[]` marks a list of tables."""
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None or (name == "learning" and prefix):
            yield prefix + name, field
        else:
            listed = typing.get_origin(field.annotation) is tuple
            yield from leaves(inner, f"{prefix}{name}{'[]' if listed else ''}.")


def table(model: type[BaseModel], meanings: dict[str, str], skip: frozenset[str] = frozenset()) -> str:
    """One Markdown table a section. Raises KeyError for a key without meaning, or a meaning without key."""
    fields = {key: field for key, field in leaves(model) if key not in skip}
    if unknown := meanings.keys() - fields.keys():
        raise KeyError(f"no such key: {', '.join(sorted(unknown))}")
    sections: dict[str, list[str]] = {}
    for key, field in fields.items():
        section, _, name = key.rpartition(".")
        said = " ".join(
            filter(
                None, (meanings.get(key, ""), _sentence((field.description or "").replace("None", "not set")))
            )
        )
        if not said:
            raise KeyError(f"no meaning: {key}")
        row = f"| `{name}` | {_default(field)} | {_allowed(field)} | {_cell(said)} |"
        sections.setdefault(section, []).append(row)
    parts = []
    for section, rows in sorted(sections.items(), key=lambda pair: bool(pair[0])):  # TOML: top level first
        title = (
            "top level" if not section else f"`[[{section[:-2]}]]`" if "[]" in section else f"`[{section}]`"
        )
        parts.append(
            f"### {title}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def merge_methods() -> str:
    """What may stand in `method`, with the options of each."""
    rows = [
        f"| `{name}` | {_options(method.options)} | {method.paper} |"
        for name, method in sorted(methods().items())
    ]
    processed = ", ".join(f'`"{name}"`' for name in sorted(processes()))
    learned = (
        '`granularity` = `"layer"`, `"domain"` or `"tensor"`; `process` = `"none"`, or a method whose '
        f"processed vectors are learned on, with its options beside it: {processed}"
    )
    rows += [
        f"| `adamerging` | {learned} | {LEARNED_PAPERS['adamerging']} |",
        *(
            f"| `{name}` | as `adamerging` | {paper} |"
            for name, paper in LEARNED_PAPERS.items()
            if name not in ("adamerging", CONFLUENCE, AUTO)
        ),
        f"| `{CONFLUENCE}` | {_options(ConfluenceOptions)} | {LEARNED_PAPERS[CONFLUENCE]} |",
        f"| `{AUTO}` | {_options(AutoOptions)} | {LEARNED_PAPERS[AUTO]} |",
    ]
    return "| `method` | options with defaults | source |\n|---|---|---|\n" + "\n".join(rows)


def adapter_methods() -> str:
    """The same for a run with `[lora]`."""
    rows = []
    for name, method in sorted(METHODS.items()):
        options = ", ".join(f"`{key}` = {_toml(value)}" for key, value in method.check({}).items())
        rows.append(f"| `{name}` | {options.replace('null', 'not set') or 'none'} | {method.paper} |")
    return "| `method` | options with defaults | source |\n|---|---|---|\n" + "\n".join(rows)


def render() -> str:
    """The whole page."""
    run_keys = frozenset(key for key, _ in leaves(RunConfig))
    policy_keys = frozenset(f"policy.{key}" for key, _ in leaves(EgressPolicy))
    simulation_keys = frozenset(key for key, _ in leaves(SimulationConfig))
    reference = "\n".join(f"{key} = {_toml(value)}" for key, value in REFERENCE_LEARNING.items())
    return "\n".join(
        [
            HEAD,
            "## A run",
            "\nRead by `isthmus run start CONFIG`, and the greater part of what `isthmus simulate` reads.",
            "The server signs it and sends it to the owners; it holds no path of theirs and no code.\n",
            table(RunConfig, RUN_MEANINGS),
            "\n### Merge methods\n",
            "Each `[[merge]]` entry becomes one row of the results. Without any, there are seven: the three",
            "training-free methods, and `adamerging` and `mergerec` with either granularity. The entry that",
            "`publish` names by its label becomes the universal model.\n",
            merge_methods(),
            AUTO_TEXT.format(candidates=default_candidates()),
            "\nA run with `[lora]` merges [adapters](language-models.md) and has methods of its own; without",
            f"`[[merge]]` entries there are {', '.join(f'`{name}`' for name in ADAPTER_MERGES)}.\n",
            adapter_methods(),
            '\n### `preset = "reference"`\n',
            "Fills these values in `[learning]`, as the reference implementation has them:\n",
            f"```toml\n[learning]\n{reference}\n```",
            "\n## A simulation",
            "\nA run's file with these keys in addition. Read by `isthmus simulate CONFIG --out DIR`.",
            "`[policy]` is the `policy.toml` of every owner, with the keys below.\n",
            table(SimulationConfig, SIMULATION_MEANINGS, skip=run_keys | policy_keys),
            "\n## Attacks",
            "\nA simulation's file and these keys. Read by `isthmus attacks CONFIG --out DIR`.\n",
            table(AttackConfig, {}, skip=simulation_keys),
            "\n## client.toml",
            "\nIn an owner's home, written by `isthmus client join`. Only the owner changes it; nothing that",
            "the server sends does. Restart `isthmus client up` after an edit.\n",
            table(ClientConfig, CLIENT_MEANINGS),
            "\n## policy.toml",
            "\nIn an owner's home, written by `isthmus client join`: what may leave. Only the",
            "owner changes it; it is read anew for each order. See [gate.md](gate.md).\n",
            table(EgressPolicy, {}),
            "\n## server.toml",
            "\nIn the server's home, written by `isthmus server init`. The TLS certificate is made for",
            "`hosts` once: a new name or address needs a new certificate from the home's CA.\n",
            table(ServerConfig, SERVER_MEANINGS),
            "",
        ]
    )


def _options(model: type[BaseModel]) -> str:
    found = [f"`{name}` = {_toml(field.default)}" for name, field in model.model_fields.items()]
    return ", ".join(found) or "none"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _model_in(inner))), None)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is pydantic_core.PydanticUndefined:
        return "required"
    return "not set" if value is None else "none" if value == {} else f"`{_cell(_toml(value))}`"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value) if isinstance(value, StrEnum) else value)


def _allowed(field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    bounds = [
        f"{sign} {value:g}"
        for m in field.metadata
        for k, sign in BOUNDS.items()
        if (value := getattr(m, k, None)) is not None
    ]
    return " ".join([kind, *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])


def _kind(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in map(str, inner))
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "table"
    if origin in (types.UnionType, typing.Union):
        return next(_kind(part) for part in inner if part is not types.NoneType)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return "names"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(annotation, "table")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
