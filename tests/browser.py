"""A headless Chromium that looks at pages, and what it must see on every one of ours.

Driven by Selenium through the machine's own chromedriver; nothing is downloaded, and where either program
is missing the tests that need them are skipped. The checks are a few of those that axe makes, done simply.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Ratios below 4.5 (large text: 3) between a text and the first opaque background behind it (WCAG 2.2, 1.4.3).
CONTRAST = r"""
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const parse = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = rgb => rgb.slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (!text || !element.checkVisibility() || element.closest('title, style')) continue;
  seen += 1;
  const style = getComputedStyle(element), size = parseFloat(style.fontSize);
  const ink = light(parse(element.closest('svg') ? style.fill : style.color)), paper = light(behind(element));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
}
return [seen, found];
"""
# What a screen reader needs: headings in order, named tables and pictures, links that lead somewhere.
STRUCTURE = r"""
const all = selector => [...document.querySelectorAll(selector)];
const levels = all('h1, h2, h3, h4, h5, h6').map(h => +h.tagName[1]), found = [];
if (levels.filter(level => level === 1).length !== 1 || levels[0] !== 1) found.push('not one h1, and first');
levels.forEach((level, i) => {
  if (i && level > levels[i - 1] + 1) found.push(`h${level} after h${levels[i - 1]}`);
});
if (!document.documentElement.lang) found.push('no language');
if (!document.title.trim()) found.push('no title');
if (all('main').length !== 1) found.push('not one main');
all('table').forEach(t => {
  if (!t.caption && !t.ariaLabel) found.push('table without a name: ' + t.innerText.slice(0, 40));
  if (!t.querySelector('th')) found.push('table without heads');
});
all('svg:not(svg svg)').forEach(s => {
  const named = s.getAttribute('role') === 'img' && s.ariaLabel;
  if (s.ariaHidden !== 'true' && !named) found.push('unnamed picture');
});
all('nav, [role=region]').forEach(n => {
  if (!n.ariaLabel && !n.getAttribute('aria-labelledby')) found.push('unnamed landmark');
});
const ids = all('[id]').map(e => e.id);
if (new Set(ids).size !== ids.length) found.push('an id twice');
all('a').forEach(a => {
  if (!document.getElementById(a.hash.slice(1))) found.push('dead link: ' + a.innerText);
});
all('[aria-labelledby]').forEach(e => {
  if (!document.getElementById(e.getAttribute('aria-labelledby'))) found.push('a label that is not there');
});
all('*').forEach(e => {
  const scrolls = ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  const hidden = scrolls && e.scrollWidth > e.clientWidth + 1;
  if (hidden && e.tabIndex < 0) found.push('scrolls, but not by keyboard: ' + e.className);
});
return found;
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver with an empty `profile`; skips the test where there is no browser."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium or Chrome with its chromedriver (Debian: apt-get install chromium-driver)")
    os.environ["SE_OFFLINE"] = "true"
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def show(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> list[str]:
    """Load `page` afresh; returns what went wrong: console messages, and requests for anything else."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [line["message"] for line in browser.get_log("browser")] + [
        f"requested {url}" for url in requests if url != page.as_uri()
    ]


def faults(browser: Any) -> list[str]:
    """What the page that is shown lacks: contrast, structure, or room."""
    seen, pale = browser.execute_script(CONTRAST)
    assert seen > 20, "the check of contrast saw next to no text"
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    return [*pale, *browser.execute_script(STRUCTURE), *([f"{wide} pixels too wide"] if wide > 0 else [])]
