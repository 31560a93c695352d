"""What a merged folder says about itself: `merge.json` and the card, README.md.

Both name the inputs by folder name and digest, never by path: a card that is published should not tell how
somebody's disk is laid out. A folder's digest is the SHA-256 over its weight files' lines as `sha256sum`
prints them, sorted by name.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import storage_errors
from server.folders import ModelFolder
from server.merging import Method

LIMITS = """\
Merged from weights alone and not evaluated by this tool. Licences and limits of the base and of every model
apply to the result, and what a model has learned of its training data may be in it."""


def method_facts(name: str, method: Method | None) -> dict[str, str]:
    """Name, paper and equation; `method` is None for a learned one."""
    if method is None:
        from server.engine.explain import explain
        from server.merge import LEARNED_PAPERS

        return {"method": name, "paper": LEARNED_PAPERS[name], "equation": explain(name)[0].equation}
    return {"method": method.name, "paper": method.paper, "equation": method.equation}


def folder_facts(folder: ModelFolder, sha256: Mapping[Path, str]) -> dict[str, Any]:
    """A folder's name and weight files, with digests where they are known."""
    files = {file.relative: sha256.get(folder.path / file.relative) for file in folder.files}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    known = all(files.values())
    digest = hashlib.sha256(lines.encode()).hexdigest() if known else None
    return {"name": folder.path.name, "sha256": digest, "files": files}


def peak_memory_bytes() -> int:
    """The most memory that this process ever held (resident)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write(folder: Path, record: Mapping[str, Any], base: ModelFolder) -> None:
    """Write `merge.json` and README.md into `folder`."""
    with storage_errors(folder):
        (folder / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme(record, base), encoding="utf-8")


def readme(record: Mapping[str, Any], base: ModelFolder) -> str:
    """The card, with the front matter that the Hugging Face hub reads."""
    sentence = base.is_sentence_model
    tags = ["model-merging", record["method"], *(["sentence-transformers"] if sentence else [])]
    front = [f"library_name: {'sentence-transformers' if sentence else 'transformers'}", "tags:"]
    load = (
        'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("this/folder")'
        if sentence
        else 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("this/folder")'
    )
    rows = [f"| base | {_row(record['base'], '')} |"]
    for label, facts in record["models"].items():
        rows.append(f"| {label} | {_row(facts, facts['weight'])} |")
        if "catalog" in facts:
            rows.append(f"| catalog of {label} | {_row(facts['catalog'], '')} |")
    parts = [
        "\n".join(["---", *front, *[f"- {tag}" for tag in tags], "---"]),
        f"# Merged by {record['method']}",
        f"`{record['equation']}`\n\n{record['paper']}",
        f"```python\n{load}\n```",
        "## Inputs\n\n| | folder | weight | SHA-256 |\n|---|---|---|---|\n" + "\n".join(rows),
        "The digest of a folder is that of the list which `sha256sum` prints for its weight files.",
        f"## Recipe\n\n```toml\n{_recipe(record)}\n```",
    ]
    if "why" in record.get("facts", {}):
        parts.append(_choice(record["facts"]))
    if record["coefficients"]:
        parts.append(_coefficients(record))
    if record["warnings"]:
        names = "\n".join(f"- {text}" for text in record["warnings"])
        parts.append(f"## Warnings\n\n{names}")
    parts.append(f"## Limits\n\n{LIMITS}")
    return "\n\n".join(parts) + "\n"


def _row(facts: Mapping[str, Any], weight: object) -> str:
    digest = f"`{facts['sha256']}`" if facts["sha256"] else "not computed"
    return f"{_cell(facts['name'])} | {weight} | {digest}"


def _recipe(record: Mapping[str, Any]) -> str:
    """The resolved recipe, every key with its value."""
    top = {"base": record["base"]["name"], **{key: record[key] for key in ("method", "dtype", "seed")}}
    sections = {key: record[key] for key in ("options", "learning", "text") if key in record}
    models = [
        {
            "path": facts["name"],
            "label": label,
            "weight": facts["weight"],
            "catalog": facts.get("catalog", {}).get("name"),
        }
        for label, facts in record["models"].items()
    ]
    return recipe_toml(top, sections, models)


def recipe_toml(
    top: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> str:
    """A recipe's text. What is None is left out. JSON's numbers, lists and texts are TOML's too."""
    tables = [("", top), *((f"[{name}]", values) for name, values in sections.items())]
    tables += [("[[model]]", model) for model in models]
    parts = []
    for head, values in tables:
        rows = [
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in values.items()
            if value is not None
        ]
        parts.append("\n".join([head, *rows] if head else rows))
    return "\n\n".join(parts)


def _choice(facts: Mapping[str, Any]) -> str:
    """What `auto` chose among, and why."""
    domains = list(next(iter(facts["scores"].values()))["domains"])
    rows = [
        f"| {label} | {row['average']:.4f} | "
        + " | ".join(f"{row['domains'][domain]:.4f}" for domain in domains)
        + f" | {'yes' if row['allowed'] else 'no'} |"
        for label, row in facts["scores"].items()
    ]
    head = f"| candidate | average | {' | '.join(domains)} | allowed |\n|---|---|{'---|' * len(domains)}---|"
    return (
        f"## Why\n\nChosen: {facts['chosen']}, {facts['why']}.\nScores: {facts['proxy']}.\n\n"
        + head
        + "\n"
        + "\n".join(rows)
    )


def _coefficients(record: Mapping[str, Any]) -> str:
    labels = list(record["models"])
    rows = [
        f"| {group} | " + " | ".join(f"{values[label]:.4f}" for label in labels) + " |"
        for group, values in record["coefficients"].items()
    ]
    head = f"| coefficient of | {' | '.join(labels)} |\n|---|" + "---|" * len(labels)
    return "## Coefficients\n\n" + head + "\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
