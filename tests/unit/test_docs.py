"""What the documentation shows is checked: commands parse, configurations validate, code compiles, links lead
somewhere, and the generated page is the one that is checked in.

Fenced blocks are checked by their language: `bash`, `toml`, `python`. A first line `# not checked` leaves a
block out. In data-formats.md a block ` ```text FORMAT/FILE ` is a file that the reader of that format reads.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from clients.data.readers import ReadOptions, read
from clients.data.records import Issues
from clients.home import ClientConfig
from clients.policy import EgressPolicy
from common.cli import cli
from common.config import RunConfig, validate
from server.engine.recipe import make_recipe
from server.home import ServerConfig
from server.merge import check_method
from server.merging import find
from simulations.config import SimulationConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "proto" / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "decisions").glob("*.md")),
]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
MODELS = {
    "simulation": SimulationConfig,
    "run": RunConfig,
    "client": ClientConfig,
    "policy": EgressPolicy,
    "server": ServerConfig,
}


class Block(NamedTuple):
    """A fenced block: where, its language, what follows the language, and its text."""

    where: str
    language: str
    info: str
    text: str


def _blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            block = Block(f"{page.relative_to(ROOT)}:{line}", match[1], match[2].strip(), match[3])
            if block.language == language and not block.text.startswith("# not checked"):
                found.append(block)
    return found


def _commands(text: str) -> list[list[str]]:
    """The `isthmus ...` command lines of a shell block, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    words = [line[line.index("isthmus") :] if "isthmus" in line[:2] else line for line in words]
    return [line[1:] for line in words if line and Path(line[0]).name == "isthmus"]


COMMANDS = [
    pytest.param(command, id=f"{block.where} isthmus {' '.join(command)}")
    for block in _blocks("bash")
    for command in _commands(block.text)
]


def _parse(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> None:
    """Parse as the real command line does, without running anything. Raises click.ClickException."""
    if {"--help", "--version"} & set(arguments):
        return
    with command.make_context(command.name or "isthmus", list(arguments), parent=parent) as context:
        if isinstance(command, click.Group):
            rest = [*context._protected_args, *context.args]
            _, inner, arguments = command.resolve_command(context, rest)
            assert inner is not None
            _parse(inner, arguments, context)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_line_parses(arguments: list[str]) -> None:
    _parse(cli, arguments)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)}
    assert shown and shown <= targets


def test_the_parser_refuses_what_is_not_there() -> None:
    for wrong in (["simulat", "x.toml"], ["simulate", "x.toml", "--output", "y"], ["run", "start"]):
        with pytest.raises(click.ClickException):
            _parse(cli, wrong)


def _ids(blocks: list[Block]) -> list[str]:
    return [block.where for block in blocks]


@pytest.mark.parametrize("block", _blocks("toml"), ids=_ids(_blocks("toml")))
def test_every_configuration_validates(block: Block) -> None:
    """The word after `toml` says what the file is; without one it is a run's or a simulation's."""
    data = tomllib.loads(block.text)
    if block.info == "recipe":
        recipe = make_recipe(data, where=block.where, folder=DOCS)
        find(recipe.method).resolve(recipe.options)
        return
    model = MODELS.get(block.info, SimulationConfig)
    config = validate(data, model, where=block.where)
    if isinstance(config, RunConfig):
        for method in config.merge:
            check_method(method, config)


@pytest.mark.parametrize("block", _blocks("python"), ids=_ids(_blocks("python")))
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}: no such heading"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "name", ["columns", "recbole", "movielens", "amazon2014", "amazon2018", "amazon2023"]
)
def test_examples_of_data_formats_are_read(name: str, tmp_path: Path) -> None:
    _write_example(name, tmp_path)
    records = read(tmp_path, Issues(), ReadOptions())
    assert records.format == name
    assert len(records.interactions) >= 2
    assert all(row["title"] for row in records.items.rows.values())


def test_the_example_of_mergerec_is_read(tmp_path: Path) -> None:
    _write_example("mergerec", tmp_path)
    records = read(tmp_path, Issues(), ReadOptions())
    assert records.presplit
    assert records.interactions.item_ids == ["B01", "B02", "B03"]


def _write_example(name: str, folder: Path) -> None:
    for block in _blocks("text"):
        if block.info.startswith(f"{name}/"):
            (folder / block.info.partition("/")[2]).write_text(block.text, encoding="utf-8")


def test_the_configuration_page_is_up_to_date() -> None:
    path = str(DOCS / "generate_configuration.py")
    code = f"import runpy, sys; sys.stdout.write(runpy.run_path({path!r})['render']())"
    # in a process of its own: other tests register merge methods that the page must not know
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert made == written, "run: python docs/generate_configuration.py"
