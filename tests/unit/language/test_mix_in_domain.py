"""A cocktail inside the domain: what is written, that no label counts, the command, ablation and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from clients.data.instructions import rankings_of
from clients.language_cli import app
from clients.training import cocktail as in_domain
from clients.training.cocktail import mix_in_domain
from common.config import InstructionSection, LoraSection
from common.errors import ConfigError, VectorError
from common.language.ablation import ablation
from common.language.adapters import Adapter, adapter_tensors, load_adapter, save_adapter
from common.language.cocktail import Cocktail, unlabelled
from common.language.evaluation import evaluate_rankings
from common.language.mixing import mix
from common.language.options import CocktailOptions
from common.language.prompts import FOLDER, Template
from server.language.plots import weights_page

pytestmark = pytest.mark.parametrize("tiny_causal", ["qwen2"], indirect=True)
LORA = LoraSection(rank=2, alpha=4.0, modules=("q_proj", "down_proj"))
QUICK = CocktailOptions(steps=4, batch_size=3, prompts=6, evaluate_every_steps=2, learning_rate=0.2)
INSTRUCTION = InstructionSection(candidates=4)


def adapter_of(base: Path, seed: int, lora: LoraSection = LORA) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in adapter_tensors(base, lora).items()
    }


@pytest.fixture
def parts(tiny_causal: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders of a base spirit and an ingredient."""
    for seed, name in enumerate(("spirit", "ingredient")):
        save_adapter(tiny_causal, LORA, adapter_of(tiny_causal, seed), tmp_path / name, "")
    return {"spirit": tmp_path / "spirit", "ingredient": tmp_path / "ingredient"}


def mixed(base: Path, parts: dict[str, Path], domain: Any, out: Path, **changes: Any) -> Cocktail:
    given: dict[str, Any] = {"options": QUICK, "instruction": INSTRUCTION, "precision": "fp32", **changes}
    return mix_in_domain(base, parts["spirit"], parts["ingredient"], domain, out, **given)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_peft_loads_what_was_mixed(
    tiny_causal: Path, lm: Any, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    made = mixed(tiny_causal, parts, pico_domain, tmp_path / "out", options=replace_rule("product"))
    assert made.lora.rank == 4
    record = json.loads((tmp_path / "out" / "cocktail.json").read_text())
    assert record["weights"] == made.weights and set(made.weights["all"]) == {"base spirit", "ingredient"}
    ids = torch.tensor([lm.encode("tea cup")])
    lm.attach(made.lora, made.adapter)
    expected = lm.model(ids).logits
    lm.detach()
    loaded = PeftModel.from_pretrained(lm.model, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(ids).logits, expected)


def replace_rule(rule: str) -> CocktailOptions:
    return QUICK.model_copy(update={"rule": rule})


def test_nothing_private_is_written(
    tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    mixed(tiny_causal, parts, pico_domain, tmp_path / "out")
    texts = [
        path.read_text(encoding="utf-8")
        for folder in ("out", "out.work")
        for path in (tmp_path / folder).rglob("*")
        if path.suffix in (".json", ".jsonl", ".md")
    ]
    assert len(texts) >= 5
    for private in (*pico_domain.user_ids, *pico_domain.attributes["title"]):
        assert not any(private in text for text in texts)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_label_counts(
    tiny_causal: Path,
    parts: dict[str, Path],
    pico_domain: Any,
    tmp_path: Path,
    split: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever candidate is the right one, the weights are the same."""
    honest = mixed(tiny_causal, parts, pico_domain, tmp_path / "a", split=split)

    def lying(*arguments: Any, **keywords: Any) -> Any:
        return [replace(ranking, target=0) for ranking in rankings_of(*arguments, **keywords)]

    monkeypatch.setattr(in_domain, "rankings_of", lying)
    assert mixed(tiny_causal, parts, pico_domain, tmp_path / "b", split=split).weights == honest.weights


def test_a_spirit_of_another_scaling_and_rank(
    tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    """The same updates under another alpha give the same cocktail; another rank mixes by product only."""
    plain = mixed(tiny_causal, parts, pico_domain, tmp_path / "plain")
    lora, adapter = load_adapter(parts["spirit"])
    quarter = lora.model_copy(update={"alpha": lora.alpha / 4})
    doubled = {name: 2 * tensor for name, tensor in adapter.items()}
    save_adapter(tiny_causal, quarter, doubled, tmp_path / "quarter", "")
    same = mixed(tiny_causal, {**parts, "spirit": tmp_path / "quarter"}, pico_domain, tmp_path / "same")
    assert same.weights == plain.weights

    small = LORA.model_copy(update={"rank": 1})
    save_adapter(tiny_causal, small, adapter_of(tiny_causal, 3, small), tmp_path / "small", "")
    other = {**parts, "spirit": tmp_path / "small"}
    with pytest.raises(VectorError, match=r"adapter ingredient.*rank 2, expected 1"):
        mixed(tiny_causal, other, pico_domain, tmp_path / "no")
    by_product = replace_rule("product")
    assert mixed(tiny_causal, other, pico_domain, tmp_path / "yes", options=by_product).lora.rank == 3


def test_an_input_is_not_written_over(
    tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is one of the inputs"):
        mixed(tiny_causal, parts, pico_domain, parts["spirit"])


def test_only_an_earlier_cocktail_is_replaced(
    tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    pico_domain.save(tmp_path / "domain")
    before = sorted(path.name for path in (tmp_path / "domain").iterdir())
    with pytest.raises(ConfigError, match="exists and is no cocktail"):
        mixed(tiny_causal, parts, pico_domain, tmp_path / "domain")
    assert sorted(path.name for path in (tmp_path / "domain").iterdir()) == before
    made = [mixed(tiny_causal, parts, pico_domain, tmp_path / "out").weights for _ in range(2)]
    assert made[0] == made[1]


def test_the_command(tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path) -> None:
    pico_domain.save(tmp_path / "domain")
    folders = {"--domain": tmp_path / "domain", "--out": tmp_path / "out"}
    folders |= {f"--{name}": folder for name, folder in parts.items()}
    given = ["mix", str(tiny_causal), *(str(word) for pair in folders.items() for word in pair)]
    given += ["--candidates", "4", "--prompts", "6", "--steps", "2", "--device", "cpu", "--precision", "fp32"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "base spirit 0." in result.output and "entropy of held-back prompts" in result.output
    assert load_adapter(tmp_path / "out")[0] == LORA
    for option, value, said in (("--rule", "sum", "factors or product"), ("--protocol", "cold", "1 prompt")):
        refused = CliRunner().invoke(app, [*given, option, value])
        assert refused.exit_code != 0 and said in refused.output
    refused = CliRunner().invoke(app, [*given, "--candidates", "1001"])
    assert refused.exit_code != 0 and "candidates: Input should be less" in refused.output


def test_the_command_takes_a_template_of_ones_own(
    tiny_causal: Path, parts: dict[str, Path], pico_domain: Any, tmp_path: Path
) -> None:
    pico_domain.save(tmp_path / "domain")
    own = (FOLDER / "next.toml").read_text().replace("Which of the candidates", "And which")
    (tmp_path / "mine.toml").write_text(own)
    folders = [word for name, folder in parts.items() for word in (f"--{name}", str(folder))]
    shown: list[Any] = []
    for template in ("next", str(tmp_path / "mine.toml")):
        out = tmp_path / Path(template).stem
        result = CliRunner().invoke(
            app,
            ["mix", str(tiny_causal), *folders, "--domain", str(tmp_path / "domain"), "--out", str(out),
             "--candidates", "4", "--prompts", "6", "--steps", "1", "--device", "cpu", "--template", template,
             "--format", "json"],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        shown.append(json.loads(result.stdout)["facts"]["held_back_loss"])
    assert shown[0] != shown[1]  # other prompts


def test_the_rows_of_the_ablation(tiny_causal: Path, lm: Any, pico_domain: Any, tmp_path: Path) -> None:
    spirit, ingredient = adapter_of(tiny_causal, 0), adapter_of(tiny_causal, 1)
    template, labelled = Template.load(), rankings_of(pico_domain, "valid", 0, 4, max_users=8)
    worn: list[Adapter] = []

    def evaluate(model: Any) -> dict[str, float]:
        worn.append(model.adapter())
        return evaluate_rankings(model, template, labelled).metrics

    def tune(start: Adapter) -> Adapter:
        assert all(torch.equal(start[name], spirit[name]) for name in spirit)
        return ingredient

    cocktails = {"cocktail": QUICK, "cocktail product": replace_rule("product")}
    rows = ablation(
        lm, "base", LORA, spirit, ingredient, template, unlabelled(labelled), evaluate, tmp_path,
        cocktails=cocktails, tune=tune,
    )  # fmt: skip
    names = ["G", "S", "WA", "WA product", "cocktail", "cocktail product", "second round"]
    assert [row.name for row in rows] == names
    by_name = dict(zip(names, zip(rows, worn, strict=True), strict=True))
    parts = {"g": spirit, "s": ingredient}
    rules = {"WA": "factors", "WA product": "product", **{n: o.rule for n, o in cocktails.items()}}
    for name, rule in rules.items():
        row, adapter = by_name[name]
        expected = mix(parts, list(row.weights.values()), rule)  # type: ignore[arg-type]
        for tensor in expected:
            torch.testing.assert_close(adapter[tensor], expected[tensor])
    assert by_name["second round"][0].metrics == by_name["S"][0].metrics
    assert {row.name for row in rows if row.trajectory_path} == set(cocktails)

    paths = {row.name: row.trajectory_path for row in rows if row.trajectory_path}
    page = weights_page(paths, "Weights <of> tea")
    assert page.count("<polyline") == 4 + 2 and "base spirit, cocktail product" in page
    assert "Weights &lt;of&gt; tea" in page and "No steps" in weights_page({"warm": tmp_path / "none"})
