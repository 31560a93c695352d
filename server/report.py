"""`report.html`: one run to look at, in one file that works without a network and prints.

It is read from `summary.json` and `metrics.jsonl` (docs/summary-schema.md) and nothing else. Whatever is
absent there - a lost domain, metrics that an owner does not allow, a trajectory - is absent here or shown
as a dash. Every text is escaped (`common.pages`); nothing is loaded from anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import write_atomic
from common.pages import Html, digest, finite, join, number, page, tag
from server.reporting import sections
from server.reporting.charts import bars
from server.reporting.data import Json, metric_name, metrics, part, read_events, read_summary

SYNTHETIC = "Synthetic demo data: figures say nothing about real shops"
PARTS = Path(__file__).with_name("reporting")


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from the other two files there, whole or not at all; returns its path.

    Raises DataError when `summary.json` is missing, damaged or of another schema. `metrics.jsonl` may be
    missing or end in a cut line.
    """
    text = render(read_summary(folder / "summary.json"), read_events(folder / "metrics.jsonl"))
    write_atomic(folder / "report.html", text.encode("utf-8"))
    return folder / "report.html"


def render(summary: Json, events: Sequence[Json]) -> str:
    """The whole page of a summary and its events."""
    bodies = {
        "Results": sections.results(summary),
        "Coefficients": sections.coefficients(summary, events),
        "Training": sections.training(summary, events),
        "What crossed": sections.crossings(summary),
        "Domains": sections.domains(summary),
        "Vectors": sections.vectors(summary),
        "Without each vector": sections.leave_one_out(summary),
        "Time and memory": sections.costs(summary),
        "Limits": sections.limits(summary),
        "Configuration": sections.configuration(summary),
    }
    shown = {title: body for title, body in bodies.items() if body}
    anchors = {title: title.lower().replace(" ", "-") for title in shown}
    links = (tag("a", title, href=f"#{anchor}") for title, anchor in anchors.items())
    name = str(part(summary, "run").get("name", "run"))
    return page(
        f"{name} - Isthmus run",
        (PARTS / "report.css").read_text(encoding="utf-8"),
        join(
            _heading(summary, name),
            _headline(summary),
            tag("nav", *links, aria_label="On this page"),
            *(
                tag("section", tag("h2", title, id=anchors[title]), body, aria_labelledby=anchors[title])
                for title, body in shown.items()
            ),
        ),
        tag("div", SYNTHETIC, class_="banner", role="note") if summary.get("synthetic") else "",
    )


def _heading(summary: Json, name: str) -> Html:
    run, published = part(summary, "run"), part(summary, "published")
    facts: list[object] = [join("run ", tag("code", run.get("id", "?"))), f"seed {run.get('seed', '?')}"]
    for key, what in (("created_s", "created"), ("finished_s", "finished")):
        if finite(run.get(key)):
            facts.append(f"{what} {time.strftime('%Y-%m-%d %H:%M', time.gmtime(run[key]))} UTC")
    base = part(summary, "base")
    facts.append(join("base model ", base.get("model", "?"), " ", digest(base.get("digest"))))
    if published.get("label"):
        facts.append(join("published ", published["label"], " ", digest(published.get("model_digest"))))
    line = join(*(join(" · " if index else "", fact) for index, fact in enumerate(facts)))
    return tag(
        "header", tag("p", "Isthmus run", class_="brand"), tag("h1", name), tag("p", line, class_="soft")
    )


def _headline(summary: Json) -> Html:
    label = str(part(summary, "published").get("label", ""))
    own, title = (
        ("universal", "universal model") if "universal" in part(summary, "results") else (label, label)
    )
    names = {"zero-shot": "zero-shot"}
    for merge in part(summary, "merges"):
        if part(summary, "merges", merge).get("method") == "weight-averaging" and merge != own:
            names[merge] = "weight averaging"
    names |= {own: title, "fine-tuned": "fine-tuned", "joint": "joint (not private)"}
    cards, first = [], ""
    for metric in metrics(summary)[:2]:
        found = {row: part(summary, "average", row, "normalised").get(metric) for row in names}
        values = {row: float(value) for row, value in found.items() if finite(value)}
        if own not in values:
            continue
        first = first or _sentence(metric, values, own, title)
        big = tag("span", number(values[own], 1), tag("small", " of 100"), class_="big")
        lines = bars([(names[row], value, row == own) for row, value in values.items()], 1)
        cards.append(tag("div", tag("p", f"{metric_name(metric)}, {title}"), big, lines, class_="card"))
    if not cards:
        return tag("p", "No headline: no figures of the universal model and of fine-tuned models to compare.")
    note = "Mean over the domains, in per cent of what each domain's own fine-tuned model reaches."
    return join(
        tag("p", first, class_="lead"), tag("div", *cards, class_="cards"), tag("p", note, class_="soft")
    )


def _sentence(metric: str, values: Mapping[str, float], own: str, title: str) -> str:
    text = f"The {title} reaches {values[own]:.1f} of 100 on {metric_name(metric)}"
    text += ", where 100 is each owner's own fine-tuned model"
    return text + (f" and {values['zero-shot']:.1f} no training at all." if "zero-shot" in values else ".")
