"""`isthmus demo`: four synthetic domains, a real federation, and a recommendation at the end."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from clients.data.domain import Domain
from clients.serving import current, recommend
from common.config import load_toml
from simulations.config import DomainSource, SimulationConfig
from simulations.simulate import run_simulation
from simulations.synthetic import write_domains

EXAMPLE_ITEMS = 3


def run_demo(out: Path, seed: int, *, fresh: bool = False) -> None:
    """Run the demo into `out`; a finished one there is replaced, an interrupted one is resumed."""
    console = Console(stderr=True)
    console.print("synthetic data: the figures say nothing about real shops", style="yellow")
    source = out.with_name(f".{out.name}-source-{seed}")
    shutil.rmtree(source, ignore_errors=True)
    try:
        folders = write_domains(source, seed)
        config = load_toml(Path(str(files("simulations") / "configs" / "demo.toml")), SimulationConfig)
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"seed": seed}),
                "domain": tuple(
                    DomainSource(name=folder.name, path=str(folder.resolve())) for folder in folders
                ),
            }
        )
        report = run_simulation(config, out, fresh=fresh or (out / "summary.json").exists())
    finally:
        shutil.rmtree(source, ignore_errors=True)
    _show_example(out, folders[0].name)
    console.print(
        f"open {report} in a browser; the model is {out / 'model'}", highlight=False, soft_wrap=True
    )


def _show_example(out: Path, name: str) -> None:
    """What the installed universal model recommends to the first user of one domain."""
    domain = Domain.load(out / "data" / name)
    history = [domain.item_ids[int(index)] for index in domain.train[0][-EXAMPLE_ITEMS:]]
    home = out / "domains" / name
    folder = current(home)
    if folder is None:
        return
    console = Console()
    titles = dict(zip(domain.item_ids, domain.attributes["title"], strict=True))
    console.print(f"\n{name}: after {', '.join(titles[item] for item in history)}", highlight=False)
    for item, title, score in recommend(folder, domain, history, 5):
        console.print(f"  {score:.3f}  {title}  ({item})", highlight=False)
    console.print(
        f"again: isthmus client recommend --home {home} --history {','.join(history)} --compare",
        highlight=False,
        soft_wrap=True,
    )
