"""The universal model as a folder that others load without us.

It is in sentence-transformers layout, or in PEFT's where the run trains adapters, with a model card
(README.md) and `merge.json`, the same facts for machines. Both state digests; neither holds anything about a
user. The owners get the merged vector as a parcel and compose the same model themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.config import EMBEDDED_BASE, RunConfig
from common.files import replace_folder, write_atomic
from common.language.adapters import adapted_layers, folder_digest, save_adapter
from common.language.merged import merge_into_base, merged_weight
from common.models.base import load_tensors, model_digest, save_model
from common.vectors import TaskVector, apply
from server.merge import LEARNED_PAPERS, MergeResult
from server.merging import methods

MERGE_FILE = "merge.json"
EMBEDDED_NAME = "sentence-transformers/all-MiniLM-L6-v2"

LIMITS = """\
- Merged without any interaction data: the server saw task vectors and public catalogs only. It has not
  been tested on domains other than those above.
- A task vector does leak something about the data it was trained on, and so may this model: an attacker
  who holds it can guess better than chance whether some record was in the training data. It is not
  anonymous, and no claim of anonymity is made.
- It ranks items by their texts. An item without a telling text is ranked badly, and whatever bias the base
  model or the domains' customers have is in it."""


@dataclass(frozen=True)
class Provenance:
    """What the card says beyond the merge itself. `vectors` maps each domain's pseudonym to the SHA-256 of
    its task-vector parcel's payload; `synthetic` lists the domains whose cards say so."""

    run: str
    config: RunConfig
    vectors: Mapping[str, str]
    synthetic: frozenset[str] = field(default_factory=frozenset)
    code_version: str = ""


def publish(base_folder: Path, result: MergeResult, provenance: Provenance, out: Path) -> dict[str, Any]:
    """Write the universal model to the folder `out`, whole or not at all; returns `merge.json`'s content.

    Raises VectorError when the vector does not fit the base, StorageError when the disk is full.
    """
    config = provenance.config
    record = _record(base_folder, result, provenance)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.stage")
    shutil.rmtree(stage, ignore_errors=True)
    card = _card(record, provenance)
    if config.lora is None:
        tensors = _changed(base_folder, result.vector)
        save_model(base_folder, tensors, stage, readme=card, pooling=config.base.pooling)
    else:
        save_adapter(base_folder, config.lora, result.vector, stage, card)
    record["model_digest"] = folder_digest(stage)
    write_atomic(stage / MERGE_FILE, (json.dumps(record, indent=2) + "\n").encode("ascii"))
    replace_folder(stage, out)
    return record


def publish_merged(base_folder: Path, result: MergeResult, provenance: Provenance, out: Path) -> None:
    """Write the base with the universal adapter merged into it to `out`, for servers that take no adapter.

    Raises as `publish`.
    """
    config = provenance.config
    if config.lora is None:
        return
    card = _card(_record(base_folder, result, provenance), provenance, merged=True)
    if config.instruction is not None:
        merge_into_base(base_folder, config.lora, result.vector, out, card)
        return
    base = load_tensors(base_folder)
    tensors = {
        f"{layer}.weight": merged_weight(base[f"{layer}.weight"], config.lora, result.vector, layer)
        for layer in adapted_layers(base_folder, config.lora)
    }
    save_model(base_folder, tensors, out, readme=card, pooling=config.base.pooling)


def _changed(base_folder: Path, vector: TaskVector) -> dict[str, torch.Tensor]:
    """`theta_0 + tau` for the tensors of the vector."""
    base = load_tensors(base_folder)
    merged = apply(base, vector)
    return {name: merged[name] for name in vector}


def _record(base_folder: Path, result: MergeResult, provenance: Provenance) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": provenance.run,
        "code_version": provenance.code_version,
        "base": {"name": _base_name(provenance.config), "digest": model_digest(base_folder)},
        "label": result.label,
        "method": result.method,
        "source": _paper(result.method, provenance.config),
        "options": result.options,
        "domains": {
            name: {
                "vector_sha256": provenance.vectors.get(name, ""),
                "synthetic": name in provenance.synthetic,
            }
            for name in result.domains
        },
        "coefficients": result.coefficients,
        "seconds": result.seconds,
        "inputs": result.inputs,
        "config": _public_config(provenance.config),
    }


def _paper(method: str, config: RunConfig) -> str:
    if config.lora is not None:
        from server.language.registry import METHODS

        return METHODS[method].paper
    return methods()[method].paper if method in methods() else LEARNED_PAPERS.get(method, "")


def _public_config(config: RunConfig) -> dict[str, Any]:
    """The run's configuration without the path of a local base."""
    public = config.model_dump(mode="json")
    public["base"]["model"] = _base_name(config)
    return public


def _base_name(config: RunConfig) -> str:
    """The base as the public may read it; the path of a local folder is nobody's business."""
    return EMBEDDED_NAME if config.base.model == EMBEDDED_BASE else "local folder"


def _card(record: dict[str, Any], provenance: Provenance, *, merged: bool = False) -> str:
    synthetic = [name for name in record["domains"] if name in provenance.synthetic]
    config = provenance.config
    plain = config.lora is None or (
        merged and config.instruction is None
    )  # a model for sentence-transformers
    parts = [
        _front_matter(record, bool(synthetic)) if plain else _adapter_front_matter(record, config, merged),
        f"# Universal recommender of run `{record['run']}`",
        _intro(record, synthetic),
        "## Use\n\n" + (_use(config) if plain else _use_adapter(config, merged)),
        "## Base\n\n" + f"{record['base']['name']}, digest `{record['base']['digest']}`",
        "## Domains\n\n| Domain (pseudonym) | Data | Task vector (SHA-256) |\n|---|---|---|\n"
        + "\n".join(
            f"| {name} | {'synthetic' if facts['synthetic'] else 'real'} | `{facts['vector_sha256']}` |"
            for name, facts in record["domains"].items()
        ),
        "## Merge\n\n" + _merge_text(record),
        "## Limits\n\n" + LIMITS,
        "## Configuration\n\n```json\n" + json.dumps(record["config"], indent=2) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _use(config: RunConfig) -> str:
    return (
        "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        'history = "title: Second item bought; title: First item bought"  # most recent first\n'
        "scores = model.encode([history]) @ model.encode(catalog_texts).T\n```\n\n" + _text_rule(config)
    )


def _use_adapter(config: RunConfig, merged: bool) -> str:
    """How the adapter, or the model that it is merged into, is loaded, and what it was trained to answer."""
    asked, auto = config.instruction, "AutoModel" if config.instruction is None else "AutoModelForCausalLM"
    load = (
        f'model = {auto}.from_pretrained("path/to/this/folder")\n'
        if merged
        else "from peft import PeftModel\n\n"
        f'base = {auto}.from_pretrained("the/base/model")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
    )
    code = f"```python\nfrom transformers import {auto}\n{load}```\n\n"
    if asked is None:
        return code + _text_rule(config)
    return (
        f"{code}It ranks {asked.candidates} candidate titles after a history of at most "
        f"{asked.history_items}; the prompt is Isthmus' template `{asked.template}`."
    )


def _adapter_front_matter(record: dict[str, Any], config: RunConfig, merged: bool) -> str:
    library = "transformers" if merged else "peft"
    tags = ["recommendation", "sequential-recommendation", "model-merging", "federated", record["method"]]
    tags += [] if merged else ["lora"]
    task = "feature-extraction" if config.instruction is None else "text-generation"
    lines = [f"library_name: {library}", f"pipeline_tag: {task}", "license: other", "tags:"]
    return "\n".join(["---", *lines, *[f"- {tag}" for tag in tags], "---"])


def _front_matter(record: dict[str, Any], synthetic: bool) -> str:
    """YAML that the Hugging Face hub reads; only values that need no quoting."""
    embedded = record["base"]["name"] == EMBEDDED_NAME
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "recommendation"]
    tags += ["sequential-recommendation", "model-merging", "federated", record["method"]]
    tags += ["synthetic-data"] if synthetic else []
    lines = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    lines += [f"license: {'apache-2.0' if embedded else 'other'}"]
    lines += [f"base_model: {EMBEDDED_NAME}", "base_model_relation: merge"] if embedded else []
    lines += ["tags:", *[f"- {tag}" for tag in tags]]
    return "\n".join(["---", *lines, "---"])


def _intro(record: dict[str, Any], synthetic: list[str]) -> str:
    text = (
        f"One text-based sequential recommender for {len(record['domains'])} domains, merged from their task "
        "vectors. No interaction left the company that owns it."
    )
    if synthetic:
        text += f"\n\n**Synthetic data:** {', '.join(synthetic)} are generated, not real shops."
    return text


def _text_rule(config: RunConfig) -> str:
    text = config.text
    return (
        f"An item's text is its {', '.join(text.attributes)} as `key: value`, each cut to "
        f"{text.max_attribute_tokens} tokens, joined by `, `; a history is its items' texts, most recent "
        f"first, joined by `; ` and cut to {text.max_seq_len} tokens. The score is the cosine."
    )


def _merge_text(record: dict[str, Any]) -> str:
    options = ", ".join(f"{key} = {value}" for key, value in record["options"].items()) or "none"
    text = f"Method: {record['method']} ({record['source']}), label `{record['label']}`. Options: {options}."
    if not record["coefficients"]:
        return text
    domains = list(record["domains"])
    rows = [
        f"| {group} | " + " | ".join(f"{values[name]:.4f}" for name in domains) + " |"
        for group, values in record["coefficients"].items()
    ]
    head = f"| Coefficient of | {' | '.join(domains)} |\n|---|" + "---|" * len(domains)
    return text + "\n\n" + head + "\n" + "\n".join(rows)
