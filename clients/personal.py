"""A domain's personal model: between the universal one and its own, chosen on its validation users.

`theta = (1 - w) theta_universal + w theta_own` with the share `w` that ranks best (WiSE-FT, between other
ends: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022). It is made and kept at the
owner's: nothing of it, and not even which share won, leaves.

Of adapters of a language model it is a cocktail: their factors mixed by the weights of the lowest entropy on
the owner's own unlabelled prompts (`clients.training.cocktail`), the universal adapter being the base spirit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from clients.serving import current_or_fail, own_model, settings_of, write_settings
from common.errors import BaseMismatchError, ConfigError
from common.files import replace_folder, write_atomic
from common.language.adapters import folder_digest, is_adapter
from common.models.base import model_digest, save_model
from common.models.device import default_device
from common.progress import NO_REPORT, Report

if TYPE_CHECKING:
    from clients.data.domain import Domain
    from common.config import RunConfig

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RECORD = "personal.json"
_README = (
    "# Personal model\n\nMade by Isthmus, between the universal model and this domain's own. It stays here.\n"
)


@dataclasses.dataclass(frozen=True)
class Personal:
    """The chosen `own_share` w, and for each share tried the metrics on validation users (for adapters: the
    entropy of their prompts).

    `universal_digest` and `own_digest` say between which models it lies.
    """

    own_share: float
    metrics: dict[str, dict[str, float]]
    universal_digest: str
    own_digest: str


def interpolate(
    home: Path, domain: Domain, report: Report = NO_REPORT, shares: Sequence[float] = SHARES
) -> Personal:
    """Try every share (0: universal, 1: own), and leave the best model in `models/personal`.

    Best is the highest NDCG on the validation users, the smaller share among equals. The own model was
    stopped early on the same users, which favours it a little. Text settings are those of the universal
    model's run. Of adapters the shares are learned; `shares` is not looked at.
    Raises ModelError where a model is missing, BaseMismatchError where the two are of different bases.
    """
    from clients.training.evaluate import evaluate
    from clients.training.fit import load_encoder
    from common.models.base import load_tensors

    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ConfigError("shares must be between 0 and 1", next_step=f"use {', '.join(map(str, SHARES))}")
    folders = {"universal": current_or_fail(home), "own": own_model(home)}
    config = settings_of(folders["universal"])
    if is_adapter(folders["universal"]) or is_adapter(folders["own"]):
        return _cocktail(home, folders, config, domain, report)
    ends = {name: load_tensors(folder) for name, folder in folders.items()}
    shapes = {end: {name: tensor.shape for name, tensor in tensors.items()} for end, tensors in ends.items()}
    if shapes["universal"] != shapes["own"]:
        raise BaseMismatchError(
            "the universal model and this domain's own have different tensors",
            next_step="take part in a run: both then come from its base model",
        )
    target = home.resolve() / "models" / "personal"
    target.parent.mkdir(parents=True, exist_ok=True)
    k, best, metrics = config.evaluation.k, -1.0, {}
    with TemporaryDirectory(prefix=".personal-", dir=target.parent) as temporary:
        chosen, tried = Path(temporary) / "chosen", Path(temporary) / "tried"
        for share in sorted(set(shares)):
            mixed = {
                name: tensor.lerp(ends["own"][name], share)
                for name, tensor in ends["universal"].items()
                if tensor.is_floating_point()
            }
            save_model(folders["universal"], mixed, tried, readme=_README)
            encoder = load_encoder(tried, config, training=False)
            found = evaluate(encoder, domain, config, "valid", report, phase=f"share {share:g} of own")
            metrics[f"{share:g}"] = found.metrics
            if found.metrics[f"ndcg@{k}"] > best:
                best, own_share = found.metrics[f"ndcg@{k}"], share
                replace_folder(tried, chosen)
        digests = {name: model_digest(folder) for name, folder in folders.items()}
        personal = Personal(own_share, metrics, digests["universal"], digests["own"])
        write_atomic(chosen / RECORD, (json.dumps(dataclasses.asdict(personal), indent=1) + "\n").encode())
        write_settings(chosen, config)
        replace_folder(chosen, target)
    return personal


def _cocktail(
    home: Path, folders: dict[str, Path], config: RunConfig, domain: Domain, report: Report
) -> Personal:
    """The personal model of two adapters; raises ConfigError where they are not a language model's."""
    from clients.training.adapters import required_base
    from clients.training.cocktail import mix_in_domain
    from common.language.ablation import INGREDIENT, SPIRIT
    from common.language.options import CocktailOptions

    if config.instruction is None or not all(is_adapter(folder) for folder in folders.values()):
        raise ConfigError(
            "no personal model is made of an encoder's adapters",
            next_step="isthmus client recommend --model own, or --model universal",
        )
    target = home.resolve() / "models" / "personal"
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".personal-", dir=target.parent) as temporary:
        chosen = Path(temporary) / "chosen"
        made = mix_in_domain(
            required_base(folders["own"]), folders["universal"], folders["own"], domain, chosen,
            options=CocktailOptions(seed=config.run.seed), instruction=config.instruction,
            precision=config.training.precision,
            device=default_device(), report=report,
        )  # fmt: skip
        share, held_back = round(made.weights["all"][INGREDIENT], 4), made.facts["held_back_loss"]
        entropies = {
            0.0: held_back["alone"][SPIRIT],
            0.5: held_back["equal"],
            1.0: held_back["alone"][INGREDIENT],
            share: held_back["learned"],
        }
        metrics = {f"{at:g}": {"entropy": entropies[at]} for at in sorted(entropies)}
        digests = {name: folder_digest(folder) for name, folder in folders.items()}
        personal = Personal(share, metrics, digests["universal"], digests["own"])
        write_atomic(chosen / RECORD, (json.dumps(dataclasses.asdict(personal), indent=1) + "\n").encode())
        write_settings(chosen, config)
        replace_folder(chosen, target)
    return personal


def personal_model(home: Path) -> tuple[Path, Personal]:
    """The folder of the personal model and how it was chosen. Raises ConfigError where there is none."""
    folder = home.resolve() / "models" / "personal"
    if not (folder / RECORD).is_file():
        raise ConfigError("there is no personal model", next_step="isthmus client interpolate")
    return folder, Personal(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
