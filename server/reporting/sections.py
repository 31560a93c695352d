"""The sections of a report: each from summary and events to markup, empty where there is nothing to say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from common.pages import DASH, Html, digest, finite, join, number, size, table, tag
from server.reporting.charts import Points, bars, chart, legend, smooth
from server.reporting.data import (
    Json,
    domain_names,
    group_order,
    groups,
    kind_order,
    merge_order,
    metric_name,
    metrics,
    part,
    row_order,
)

NOTES = {
    "zero-shot": "base model, untrained",
    "fine-tuned": "each owner's own model = 100",
    "joint": "not private, simulation only",
}
PHASES = ("setup", "contribute", "merge", "evaluate", "install", "joint", "total")


MEAN = ""  # the column after the domains


def results(summary: Json) -> Html:
    """One table a metric: rows by domains, each value with its normalised value below it."""
    names = metrics(summary)
    if not names:
        return tag("p", "No figures: no owner returned metrics.")
    note = (
        "Each cell: the metric in 0..1, below it normalised (fine-tuned = 100). Bold: the best merge of a "
        "column. Every owner computed its own figures; the published merge was named before the run. "
        "A mean is over the domains that returned the figure. One seed: small differences may be chance."
    )
    tables = [join(tag("h3", metric_name(name)), _metric_table(summary, name)) for name in names]
    return join(_owners_say(part(summary, "published")), tag("p", note, class_="soft"), *tables)


def _owners_say(published: Json) -> Html:
    """Whether the owners' metrics confirm what was published, in a sentence."""
    said, label = part(published, "owners_say"), str(published.get("label", "?"))
    average = part(said, "average")
    if len(average) < 2:
        return join()
    best, behind = str(said.get("best")), said.get("behind")
    over = f"of {len(average)} merges over {said.get('domains')} domains"
    verdict = f"{label}, which was published, is the best {over}" if best == label else (
        f"{best} is the best {over}; {label}, which was published, is {number(behind, 1)} points behind"
    )  # fmt: skip
    below = ", ".join(str(name) for name in said.get("below_own", []))
    own = f" It is below the own model of {below}: isthmus client interpolate." if below else ""
    return tag("p", f"By the owners' own {metric_name(str(said.get('metric')))}, {verdict}.{own}")


def _metric_table(summary: Json, metric: str) -> Html:
    columns = [*domain_names(summary), MEAN]
    value = {row: _values(summary, "results", row, metric) for row in row_order(summary)}
    value = {row: found for row, found in value.items() if found}
    widest = max((len(found.keys() - {MEAN}) for found in value.values()), default=0)
    merges = value.keys() & part(summary, "merges").keys()
    best = {c: max((value[m][c] for m in merges if c in value[m]), default=None) for c in columns}
    notes = {**NOTES, "universal": f"{part(summary, 'published').get('label', '?')} as installed"}
    body = []
    for row, found in value.items():
        scaled = _values(summary, "normalised", row, metric)
        cells = [tag("td", row, tag("small", notes[row]) if row in notes else "")]
        for column in columns:
            if column not in found:
                cells.append(tag("td", DASH, class_="mean" if column == MEAN else ""))
                continue
            text: str = number(found[column], 4)
            if row in merges and found[column] == best[column]:
                text = tag("b", text)
            few = len(found.keys() - {MEAN}) if column == MEAN else widest
            small = tag("small", number(scaled.get(column), 1), f" over {few} only" if few < widest else "")
            cells.append(tag("td", text, small, class_="mean" if column == MEAN else ""))
        body.append(tag("tr", *cells, class_="own" if row == "universal" else ""))
    head = [tag("th", ""), *(_column_head(summary, name) for name in columns[:-1])]
    head.append(tag("th", "mean", class_="mean"))
    return table(head, body, "wide", label=metric_name(metric))


def _column_head(summary: Json, name: str) -> Html:
    lost = part(summary, "domains", name).get("lost")
    return (
        tag("th", name, tag("br"), tag("small", "lost", class_="lost", title=lost))
        if lost
        else tag("th", name)
    )


def _values(summary: Json, what: str, row: str, metric: str) -> dict[str, float]:
    """Domain (or MEAN) -> value of one row, where there is one."""
    found = {domain: part(summary, what, row, domain).get(metric) for domain in part(summary, what, row)}
    found[MEAN] = part(summary, "average", row, what).get(metric)
    return {column: value for column, value in found.items() if finite(value)}


def coefficients(summary: Json, events: Sequence[Json]) -> Html:
    """Curves and final values of every merge that learned its coefficients."""
    names, blocks, shown = domain_names(summary), [], set[str]()
    finals = [groups(part(summary, "merges", label, "coefficients")) for label in merge_order(summary)]
    named = {name for final in finals for row in final.values() for name in row}
    names = [*names, *sorted(named - set(names))]  # what is no domain's, such as a base spirit
    for label in merge_order(summary):
        final = groups(part(summary, "merges", label, "coefficients"))
        steps = [e for e in events if e.get("type") == "coefficients" and e.get("merge") == label]
        if not final and not steps:
            continue
        curves, loss = _curves(steps, names)
        shown |= curves.keys()
        layered = len(final) > 1
        what = "Coefficient by step, mean over the layers" if layered else "Coefficient by step"
        charts = [chart(what, curves, names), chart("Loss by step", {"": smooth(loss)}, names)]
        seconds = part(summary, "merges", label).get("seconds")
        spent = f", {number(seconds, 1)} s" if finite(seconds) else ""
        title = tag("h3", label, " ", tag("small", ("layer-wise" if layered else "domain-wise") + spent))
        blocks.append(join(title, tag("div", *charts, class_="charts"), _heat(final, names)))
    if not blocks:
        return tag("p", "No merge of this run learned coefficients.")
    note = (
        "The coefficient of each domain's task vector in the merged model: by step, and below it the final "
        "values, shaded from the lowest to the highest of the table."
    )
    return join(tag("p", note, class_="soft"), legend(names, shown), *blocks)


def _curves(steps: Sequence[Json], names: Sequence[str]) -> tuple[dict[str, Points], Points]:
    """Domain -> (step, coefficient, averaged over the groups), and (step, loss)."""
    curves: dict[str, Points] = defaultdict(list)
    loss: Points = []
    for event in steps:
        step = event.get("step")
        if not finite(step):
            continue
        rows = groups(part(event, "coefficients")).values()
        for name in names:
            values = [row[name] for row in rows if finite(row.get(name))]
            if values:
                curves[name].append((step, sum(values) / len(values)))
        if finite(event.get("loss")):
            loss.append((step, event["loss"]))
    return curves, loss


def _heat(final: Mapping[str, Json], names: Sequence[str]) -> Html:
    """Final coefficients, group by domain, shaded between the lowest and the highest."""
    found = [v for row in final.values() for v in row.values() if finite(v)]
    if not found:
        return Html("")
    low, span = min(found), (max(found) - min(found)) or 1.0
    names, rows = [name for name in names if any(name in row for row in final.values())], []
    for group in sorted(final, key=group_order):
        cells = []
        for value in (final[group].get(domain) for domain in names):
            heat = f"--heat:{60 * (value - low) / span:.0f}%" if finite(value) else ""
            cells.append(tag("td", number(value, 3), style=heat))
        rows.append(tag("tr", tag("td", "all layers" if group == "all" else group.replace("-", " ")), *cells))
    return table([tag("th", name) for name in ["", *names]], rows, "heat", label="Final coefficients")


def training(summary: Json, events: Sequence[Json]) -> Html:
    """Curves of fine-tuning, which only a simulation can see; empty otherwise."""
    names, charts, shown = domain_names(summary), [], set[str]()
    for key, title in (("loss", "Training loss by step"), ("ndcg", "Validation NDCG by step")):
        curves: dict[str, Points] = defaultdict(list)
        for event in events:
            if event.get("type") == "training" and finite(event.get("step")) and finite(event.get(key)):
                curves[str(event.get("domain"))].append((event["step"], event[key]))
        shown |= curves.keys()
        charts.append(chart(title, {name: smooth(points) for name, points in curves.items()}, names))
    if not any(charts):
        return Html("")
    note = "Seen by the simulation only: in a federation these curves stay with their owners."
    return join(tag("p", note, class_="soft"), legend(names, shown), tag("div", *charts, class_="charts"))


def crossings(summary: Json) -> Html:
    """Domains by (direction, kind): bytes and parcels."""
    tree = part(summary, "crossings")
    ways = {"in": "to the server", "out": "to the domain"}
    columns = sorted(
        {(way, kind) for domain in tree for way in ways for kind in part(tree, domain, way)},
        key=lambda column: (column[0], kind_order(column[1])),
    )
    if not columns:
        return tag("p", "Nothing is recorded.")
    body = []
    for title, domains_here in [*((name, [name]) for name in sorted(tree)), ("all", sorted(tree))]:
        cells = [tag("td", title)]
        for way, kind in columns:
            found = [part(tree, name, way, kind) for name in domains_here]
            count, total = (sum(cell.get(key, 0) for cell in found) for key in ("count", "bytes"))
            parcels = tag("small", f"{count} parcel{'s' * (count != 1)}")
            cells.append(
                tag("td", size(total), parcels, title=f"{total} bytes") if count else tag("td", DASH)
            )
        body.append(tag("tr", *cells, class_="sum" if title == "all" else ""))
    head = [tag("th", "")] + [tag("th", kind, tag("br"), tag("small", ways[way])) for way, kind in columns]
    note = (
        "From the server's ledger: everything that went through the exchange, receipts left out. The signed "
        "ledgers of both shores are the evidence; this table is a reading of one of them."
    )
    return join(tag("p", note, class_="soft"), table(head, body, label="What crossed, by domain and kind"))


def domains(summary: Json) -> Html:
    """Who took part, who was lost and why, and the digest of what each delivered."""
    if not domain_names(summary):
        return tag("p", "No domain took part.")
    body = []
    for name in domain_names(summary):
        facts, vector = part(summary, "domains", name), part(summary, "domains", name, "vector")
        state = tag("span", "delivered", class_="kept")
        if not facts.get("delivered"):
            state = tag("span", f"lost: {facts.get('lost') or 'no reason recorded'}", class_="lost")
        elif facts.get("withdrawn"):
            state = tag("span", f"vector withdrawn: run {facts['withdrawn']}", class_="lost")
        allowed = ", ".join(f"{key} {value}" for key, value in part(vector, "training").items())
        cells = [
            name,
            facts.get("pseudonym") or DASH,
            state,
            number(facts.get("catalog_items"), 0),
            size(vector.get("bytes")),
            digest(vector.get("payload_digest")),
            allowed or DASH,
        ]
        body.append(tag("tr", *(tag("td", cell) for cell in cells)))
    head = ["domain", "pseudonym", "state", "items", "vector", "vector digest", "training facts allowed"]
    return table([tag("th", title) for title in head], body, "wide text", label="Who took part")


def vectors(summary: Json) -> Html:
    """Norm and direction of each domain's vector beside the others'; empty where nobody looked."""
    found = part(summary, "vectors", "vectors")
    if not found:
        return Html("")
    names = sorted(found)
    body = []
    for name in names:
        facts = part(found, name)
        codes = facts.get("stands_out") or []
        cells = [
            name,
            number(facts.get("norm"), 3),
            number(facts.get("norm_score"), 1),
            number(facts.get("cosine_to_others"), 3),
            number(facts.get("cosine_score"), 1),
            tag("span", ", ".join(codes), class_="lost") if codes else DASH,
            *(number(part(summary, "vectors", "cosines", name).get(other), 3) for other in names),
        ]
        body.append(tag("tr", *(tag("td", cell) for cell in cells)))
    head = ["domain", "norm", "score", "cosine to the others", "score", "stands out", *names]
    note = str(part(summary, "vectors").get("note", ""))
    grid = table([tag("th", title) for title in head], body, "wide", label="Vectors")
    return join(tag("p", note, class_="soft"), grid)


def leave_one_out(summary: Json) -> Html:
    """How the merged model changes without each vector, on pseudo-users of the public catalogs."""
    found = part(summary, "leave_one_out")
    without = part(found, "without")
    if not without:
        return Html("")
    catalogs = sorted(part(found, "probes"))
    body = []
    for name in sorted(without):
        cells = [tag("td", name)]
        for catalog in catalogs:
            changed = part(without, name, "change").get(catalog)
            small = tag("small", f"same best 10: {number(part(without, name, 'agreement').get(catalog), 3)}")
            cells.append(tag("td", f"{changed:+.4f}" if finite(changed) else DASH, small))
        body.append(tag("tr", *cells))
    head = [tag("th", title) for title in ["without the vector of", *(f"catalog of {c}" for c in catalogs)]]
    return join(
        tag("p", str(found.get("note", "")), class_="soft"),
        table(head, body, "wide", label="Without each vector"),
    )


def costs(summary: Json) -> Html:
    """Seconds a phase, memory and processor time a process, and a simulation's seconds a domain."""
    seconds, processes = part(summary, "seconds"), part(summary, "processes")
    phases = [p for p in [*PHASES, *sorted(set(seconds) - set(PHASES))] if finite(seconds.get(p))]
    spent = part(summary, "domain_seconds") or part(seconds, "domain_seconds")
    blocks = []
    if phases:
        lines = bars([(phase, seconds[phase], phase == "total") for phase in phases], 1)
        blocks.append(tag("div", tag("h3", "Seconds a phase"), lines))
    if processes:
        memory = [size(part(processes, name).get("peak_memory_bytes")) for name in sorted(processes)]
        busy = [number(part(processes, name).get("cpu_s"), 1) for name in sorted(processes)]
        used = zip(sorted(processes), memory, busy, strict=True)
        head = ["process", "peak memory", "processor s"]
        blocks.append(_grid("Memory and processor time a process", head, used))
    if spent:
        steps = sorted({step for name in spent for step in part(spent, name)})
        rows = ([name, *(number(part(spent, name).get(s), 1) for s in steps)] for name in sorted(spent))
        blocks.append(_grid("Seconds a domain", ["domain", *steps], rows))
    return tag("div", *blocks, class_="charts costs") if blocks else tag("p", "Not recorded.")


def _grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    heads = [tag("th", name) for name in head]
    return tag("div", tag("h3", title), table(heads, body, "wide", label=title))


def limits(summary: Json) -> Html:
    """What a reader must not conclude."""
    text = (
        "Task vectors leak something about the data that they were trained on; they are not anonymous, and "
        "neither is the universal model made from them. Who holds a vector and the base model can test "
        "better than by chance whether a given history was trained on, the more so the longer the training. "
        "The word embeddings stay frozen, because their change would give the private vocabulary away; that "
        "removes one leak, not all. The server sees every vector by itself. Checks at admission find broken "
        "and outlying vectors, not every backdoor that a malicious owner might plant. The figures are what "
        "the owners reported, and nobody else can recompute them."
    )
    joint = " The joint row pools all private data, which no federation can do; it is here to compare only."
    return tag("p", text + (joint if "joint" in part(summary, "results") else ""))


def configuration(summary: Json) -> Html:
    """The configuration as the TOML that it could be read from, folded away."""
    lines: list[str] = []
    for section, values in part(summary, "config").items():
        many = isinstance(values, list)
        for entry in values if many else [values]:
            if isinstance(entry, dict):
                lines += ["", f"[[{section}]]" if many else f"[{section}]"]
                lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()]
            else:
                lines.insert(0, f"{section} = {json.dumps(entry, ensure_ascii=False)}")
    text = "\n".join(lines).strip() or "Not recorded."
    return tag("details", tag("summary", "Every value, defaults included"), tag("pre", text))
