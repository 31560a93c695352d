"""Our pages in a real browser: they load alone, can be read by everybody, and open by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, faults, show
from summaries import make_events, make_summary
from test_audit import World, _bodies, _own_signer, _write

from common.audit.report import render
from common.audit.verify import verify
from common.ledger import Crossing
from common.parcels import SERVER
from server.report import write_report
from server.results import save

HOSTILE = "</style><script>document.title='taken'</script><img src=http://127.0.0.1:9/x>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The audit's page of a clean bundle and of one with a hostile entry, and a run's report."""
    folder = tmp_path_factory.mktemp("pages")
    save(folder, make_summary(), make_events())
    world = World(folder / "world")
    bundle = world.bundle(folder / "bundle")
    written = {"run": write_report(folder)}
    for name in ("clean", "bad"):
        if name == "bad":
            entry = Crossing("in", "data", "parcel", "ab" * 32, 5, "toys", HOSTILE, "demo", "accepted", 1)
            bodies = [*_bodies(bundle, SERVER), asdict(entry)]
            _write(bundle, SERVER, bodies, _own_signer(world, SERVER))
        text = render(verify(bundle, world.root()), world.root(), name=name, checked_s=1_795_000_000)
        written[name] = folder / f"{name}.html"
        written[name].write_text(text, encoding="utf-8")
    return written


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", ["clean", "bad", "run"])
def test_a_page_is_quiet_and_readable(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    assert show(browser, pages[name], width=width, scheme=scheme) == []
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert faults(browser) == []
    titles = {"clean": "Clean: no findings", "bad": "Not clean: ", "run": "three-shops"}
    assert browser.title.startswith(titles[name])


def test_the_checks_see_a_page_that_is_neither(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    """A control: what the checks above find in a page that is spoilt on purpose."""
    spoilt = (
        '<h4 style="color:#ccc;width:9999px">pale</h4><table><tr><td>1</td></tr></table><script>0</script>'
    )
    text = pages["clean"].read_text()
    page = tmp_path / "spoilt.html"
    page.write_text(text.replace("<main>", "<main>" + spoilt))
    assert any("Content Security Policy" in line for line in show(browser, page, width=375))
    found = " ".join(faults(browser))
    for fault in ("pale: 1.6", "not one h1", "table without a name", "without heads", "pixels too wide"):
        assert fault in found
    image = tmp_path / "image.html"
    policy = text[text.index("<meta http-equiv") : text.index("<title>")]
    image.write_text(text.replace(policy, "").replace("<main>", '<main><img src="missing.png" alt="">'))
    assert any("requested file:///" in line for line in show(browser, image))


def test_the_verdict_and_every_domain_are_visible(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    show(browser, pages["bad"])
    verdict = browser.find_element(By.TAG_NAME, "h1")
    assert verdict.is_displayed()
    assert " ".join(verdict.text.split()) == "Not clean: 2 findings in the ledger of server."
    captions = [element.text for element in browser.find_elements(By.TAG_NAME, "caption")]
    assert {"What beauty sent and received", "What toys sent and received"} <= set(captions)
    assert HOSTILE[:60] in browser.find_element(By.ID, "parcels").find_element(By.XPATH, "..").text
    show(browser, pages["clean"])
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("Clean: no findings")


def test_a_parcel_opens_by_keyboard_and_by_click(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["clean"])
    parcel = next(
        element
        for element in browser.find_elements(By.TAG_NAME, "details")
        if element.find_element(By.TAG_NAME, "summary").text.startswith("task-vector")
    )
    title, table = parcel.find_element(By.TAG_NAME, "summary"), parcel.find_element(By.TAG_NAME, "table")
    assert not table.is_displayed()
    for _ in range(60):  # from the top of the page, with nothing but the tabulator key
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element == title:
            break
    assert browser.switch_to.active_element == title
    title.send_keys(Keys.ENTER)
    assert table.is_displayed()
    assert "layer.weight" in table.text and "8 \N{MULTIPLICATION SIGN} 4" in table.text
    assert "yes; digest, size and content are what the header says" in parcel.text
    title.click()
    assert not table.is_displayed()
