"""A cocktail inside the domain: base spirit and own adapter, mixed on the owner's own unlabelled prompts.

Nothing leaves, and nothing of the data is in what is written but a few weights. Prompts are of the validation
split by default, so that no test item is seen at all; the paper's are of the test split. Either way the label
is taken off before anything else happens: the candidates hold the next item, and nothing says which it is.
(With the protocol "cold" the users are those whose next item is new: that much of the labels chooses, as in
the paper.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from clients.data.domain import Domain
from clients.data.instructions import rankings_of
from common.config import InstructionSection
from common.errors import ConfigError
from common.files import write_atomic
from common.language.ablation import INGREDIENT, SPIRIT
from common.language.adapters import load_adapter, save_adapter
from common.language.cocktail import Cocktail, mix_by_entropy, unlabelled
from common.language.mixing import rescaled
from common.language.model import load_causal
from common.language.options import CocktailOptions
from common.language.prompts import Template
from common.models.base import model_digest
from common.models.encoder import Precision
from common.progress import NO_REPORT, Report

RECORD = "cocktail.json"
README = """# A cocktail of two LoRA adapters

Made by Isthmus from a base spirit and a domain's own adapter; their weights are in `cocktail.json`. The
domain's adapter was trained on private interactions: this one stays with its owner, too.
"""


def mix_in_domain(
    base: Path,
    spirit: Path,
    ingredient: Path,
    domain: Domain,
    out: Path,
    *,
    options: CocktailOptions,
    instruction: InstructionSection,
    template: Template | None = None,
    split: Literal["valid", "test"] = "valid",
    precision: Precision = "auto",
    device: str = "cpu",
    report: Report = NO_REPORT,
) -> Cocktail:
    """Mix the PEFT folders `spirit` and `ingredient` of the model in `base` into the PEFT folder `out`.

    `template` is the owner's own (None: the one that `instruction` names). The spirit may have another
    scaling, and with the rule `product` another rank. `out` gets `cocktail.json` beside the adapter;
    `OUT.work` keeps the progress, so that the same call goes on after a kill. Raises ConfigError where `out`
    is one of the inputs, or holds anything but an earlier cocktail; ModelError, VectorError, DataError.
    """
    if out.resolve() in {spirit.resolve(), ingredient.resolve(), base.resolve()}:
        raise ConfigError(f"{out}: is one of the inputs", next_step="write to another folder")
    if out.exists() and not _is_cocktail(out):
        raise ConfigError(
            f"{out}: exists and is no cocktail, and would be replaced", next_step="write to another folder"
        )
    general, own = load_adapter(spirit, base), load_adapter(ingredient, base)
    lora = own[0]
    rankings = unlabelled(
        rankings_of(
            domain, split, options.seed, instruction.candidates, instruction.protocol,
            history_items=instruction.history_items, max_users=options.prompts,
            title_words=instruction.title_words,
        )
    )  # fmt: skip
    made = mix_by_entropy(
        load_causal(base, precision=precision, device=device),
        model_digest(base),
        lora,
        {SPIRIT: rescaled(general[1], general[0], lora), INGREDIENT: own[1]},
        template or Template.load(instruction.template),
        rankings,
        options,
        out.with_name(f"{out.name}.work"),
        most_tokens=instruction.max_prompt_tokens,
        report=report,
    )
    save_adapter(base, made.lora, made.adapter, out, README, base_name=str(base.resolve()))
    record = {"weights": made.weights, "facts": made.facts, "options": options.model_dump(mode="json")}
    write_atomic(out / RECORD, json.dumps(record, indent=2).encode("ascii"))
    return made


def _is_cocktail(folder: Path) -> bool:
    """Whether this module wrote the folder: an earlier result, which may be replaced."""
    readme = folder / "README.md"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace") == README
