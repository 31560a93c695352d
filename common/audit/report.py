"""`isthmus audit report`: a verified bundle as one page that a data-protection officer understands.

The verdict first, the limits last and always; in between what crossed: by time, by domain, and every parcel
opened to its signed header and its table of tensors. The page says only what `common.audit.verify` found.
A bundle may come from a malicious party: whatever it says goes through `tag`, which escapes it, is cut
short, and cannot make the page longer than the limits here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.audit.opened import opened
from common.audit.outcome import LIMITS, AuditReport, DomainReport, Tally
from common.audit.timeline import LATEST_S, Dot, Lane, moment, named, timeline
from common.audit.words import GLOSSARY, KINDS, MEANINGS, withdrawn
from common.ledger import Crossing
from common.pages import (
    DASH,
    Html,
    columns,
    count,
    cut,
    facts,
    join,
    listed,
    page,
    row,
    size,
    table,
    tag,
)
from common.parcels import EVERYONE, SERVER, Kind
from common.roots import Root
from common.signing import PublicKey

MOST_FINDINGS = 200
MOST_KINDS = 24


def render(report: AuditReport, root: Root, *, name: str, checked_s: int) -> str:
    """The whole page about the bundle `name`, verified against `root` at `checked_s` (Unix seconds)."""
    found = Counter((finding.shore, finding.index) for finding in report.all_findings)
    sections = (
        ("findings", "Findings", "Findings", _findings(report)),
        ("timeline", "Timeline", "What crossed when", timeline(_lanes(report, root, found))),
        ("domains", "Domains", "What each domain sent and received", _domains(report)),
        ("parcels", "Parcels", "Every parcel, opened", opened(report, found)),
        ("ledgers", "Ledgers", "The ledgers", _ledgers(report, root)),
        ("limits", "What is not proven", "What is not proven", _limits(report)),
        ("words", "Words", "Words", _glossary()),
    )
    links = (tag("a", short, href=f"#{anchor}") for anchor, short, _, _ in sections)
    bodies = (
        tag("section", tag("h2", title, id=anchor), body, aria_labelledby=anchor)
        for anchor, _, title, body in sections
    )
    return page(
        f"{join(*_verdict(report))} - {name}",
        Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
        join(_head(report, root, name, checked_s), tag("nav", *links, aria_label="On this page"), *bodies),
    )


# The verdict


def _verdict(report: AuditReport) -> tuple[str, str]:
    """Clean or not, and the rest of that sentence."""
    findings, ledgers = report.all_findings, count(len(report.shores), "ledger")
    if not report.shores:
        return "Nothing checked", ": the bundle holds no ledger"
    if findings:
        where = sorted({finding.shore for finding in findings})
        plural = "ledgers" if len(where) > 1 else "ledger"
        found = count(len(findings), "finding")
        return "Not clean", f": {found} in the {plural} of {cut(listed(where))}"
    entries = sum(shore.entries for shore in report.shores)
    return "Clean", f": no findings in {count(entries, 'entry', 'entries')} of {ledgers}"


def _head(report: AuditReport, root: Root, name: str, checked_s: int) -> Html:
    first, rest = _verdict(report)
    keys = [PublicKey.from_hex(key).fingerprint for key in root.root_keys]
    present = {log.shore for log in report.shores}
    absent = [shore for shore in root.parties() if shore not in present]
    said = "What the ledgers record was checked against signatures and digests, and it agrees."
    if not present:
        said = "A verdict needs the ledger of one party at least."
    elif not report.clean:
        said = "At least one thing is not as it must be. Each is explained below, with its place."
    if present and absent:
        said += f" The ledger of {listed(absent)} is not in the bundle."
    valid = "valid until" if root.expires_s >= checked_s else "expired on"
    lead = join(said, " This proof has ", tag("a", "limits", href="#limits"), ".")
    known = {
        "Bundle": cut(name),
        "Checked": moment(checked_s),
        "Root file": f"version {root.version}, {valid} {moment(root.expires_s)}",
        f"Root key{'s' * (len(keys) != 1)}": join(*(tag("code", key, class_="key") for key in keys)),
    }
    return tag(
        "header",
        tag("p", "Isthmus audit", class_="brand"),
        tag("h1", tag("em", first), rest, "."),
        tag("p", lead, class_="lead"),
        facts(known),
        class_=f"verdict {'good' if present and report.clean else 'bad'}",
    )


def _findings(report: AuditReport) -> Html:
    findings = report.all_findings
    if not findings:
        return tag("p", "None.")
    items = []
    for finding in findings[:MOST_FINDINGS]:
        where = f"entry {finding.index}" if finding.index >= 0 else "as a whole"
        items.append(
            tag(
                "li",
                tag("h3", "Ledger of ", cut(finding.shore), f", {where}"),
                tag("p", MEANINGS.get(finding.code, "Something is not as it must be.")),
                tag("p", tag("code", finding.code), ": ", cut(finding.reason, 400), class_="soft"),
            )
        )
    rest = len(findings) - len(items)
    more = tag("p", f"And {rest:,} more: isthmus audit verify lists them all.") if rest else ""
    return join(tag("ol", *items, class_="findings"), more)


# What crossed


def _lanes(report: AuditReport, root: Root, found: Counter[tuple[str, int]]) -> list[Lane]:
    """What each domain sent and received, as its own ledger says, or the server's where that is missing.

    An entry of the server's ledger with a finding is drawn too: the domain's may not have it.
    """
    lanes = {
        (domain.domain, sent): Lane(f"{domain.domain} {'sent' if sent else 'received'}")
        for domain in report.domains
        for sent in (True, False)
    }
    public = Lane("server, to witnesses and to everybody")
    strangers = Lane("others, not in the root file")
    known = {EVERYONE, *(witness.peer for witness in root.witnesses)}
    for shore, crossings in report.evidence.crossings.items():
        for index, crossing in enumerate(crossings):
            domain = crossing.peer if shore == SERVER else shore
            wrong = found[shore, index] > 0
            if shore == SERVER and domain in report.evidence.crossings and not wrong:
                continue
            elsewhere = public if crossing.peer in known else strangers
            lane = lanes.get((domain, (crossing.direction == "out") == (shore != SERVER)), elsewhere)
            time_s = min(crossing.time_s, LATEST_S)
            lane.dots.append(Dot(time_s, _kind(crossing), crossing.size_bytes, wrong))
    return [*lanes.values(), public, strangers]


def _domains(report: AuditReport) -> Html:
    if not report.domains:
        return tag("p", "The root file names no domain.")
    rows = []
    for domain in report.domains:
        cells = (
            tag("a", domain.domain, href=f"#domain-{domain.domain}"),
            _total(domain.sent.values()),
            _total(domain.received.values()),
            _claimed(domain),
            _open(len(domain.unacknowledged)),
            tag("span", len(domain.findings), class_="lost" if domain.findings else ""),
        )
        rows.append(row(cells))
    head = ("domain", "sent", "received", "epsilon claimed", "unacknowledged", "findings in its ledger")
    overview = table(columns(head), rows, "wide", "Messages and bytes of every domain, payloads included")
    present = report.evidence.crossings.keys()
    return join(overview, *(_domain(domain, domain.domain in present) for domain in report.domains))


def _domain(domain: DomainReport, present: bool) -> Html:
    rows = []
    open_ends = Counter((str(item["shore"]), str(item["kind"])) for item in domain.unacknowledged)
    for way, giver, tallies in (
        ("sent", domain.domain, domain.sent),
        ("received", SERVER, domain.received),
    ):
        for kind, tally in _largest(tallies):
            cells = (
                named(kind),
                way,
                f"{tally.count:,}",
                size(tally.bytes),
                _open(open_ends[giver, kind]),
            )
            rows.append(row(cells))
    head = ("kind", "direction", "messages", "bytes", "unacknowledged")
    content = (
        table(columns(head), rows, "wide kinds", f"What {domain.domain} sent and received")
        if rows
        else tag("p", "No ledger of the bundle speaks of it.")
    )
    known = {
        "Pseudonym": domain.pseudonym,
        "Signs with the key": tag("code", domain.signer),
        "Differential privacy": _spend(domain),
    }
    if domain.withdrawn:
        known["Withdrawn"] = "; ".join(withdrawn(item) for item in domain.withdrawn[:MOST_KINDS])
    title = tag("h3", domain.domain, " ", _state(domain, present), id=f"domain-{domain.domain}")
    return tag("article", title, facts(known), content)


def _largest(tallies: dict[str, Tally]) -> list[tuple[str, Tally]]:
    """Kinds by bytes; those beyond `MOST_KINDS`, which only a forged ledger has, are one row."""
    ordered = sorted(tallies.items(), key=lambda item: -item[1].bytes)
    kept, rest = ordered[:MOST_KINDS], [tally for _, tally in ordered[MOST_KINDS:]]
    if rest:
        total = Tally(sum(tally.count for tally in rest), sum(tally.bytes for tally in rest))
        kept.append((f"{len(rest):,} more kinds", total))
    return kept


# The ledgers, the limits, the words


def _ledgers(report: AuditReport, root: Root) -> Html:
    logs = {log.shore: log for log in report.shores}
    rows = []
    for shore in root.parties():
        log = logs.get(shore)
        cells: tuple[object, ...] = (shore, "not in the bundle", DASH, DASH, DASH)
        if log is not None:
            seen = ", ".join(f"{name} {cosigned.size:,}" for name, cosigned in sorted(log.cosigned.items()))
            sizes = f"{log.entries:,}", f"{log.checkpoint_size:,}"
            cells = shore, *sizes, cut(seen) or DASH, tag("code", log.root)
        rows.append(row(cells))
    head = ("ledger of", "entries", "signed", "also signed by", "Merkle root")
    return table(
        columns(head),
        rows,
        "wide text",
        "Every ledger that the root file names, and up to which size who signed it",
    )


def _limits(report: AuditReport) -> Html:
    """What is proven of no domain, once; then what is not proven of some."""
    lists = [domain.not_proven for domain in report.domains] or [list(LIMITS)]
    shared = [limit for limit in lists[0] if all(limit in others for others in lists)]
    rows = (tag("li", _sentence(limit)) for limit in shared)
    own = [
        tag("li", tag("strong", domain.domain), ": ", _sentence(limit))
        for domain in report.domains
        for limit in domain.not_proven
        if limit not in shared
    ]
    more = join(tag("h3", "Of single domains"), tag("ul", *own)) if own else ""
    return join(tag("p", "This audit does not prove, of any domain:"), tag("ul", *rows), more)


def _glossary() -> Html:
    words = (join(tag("dt", word), tag("dd", meaning)) for word, meaning in GLOSSARY.items())
    kinds = (join(tag("dt", named(kind)), tag("dd", _sentence(what))) for kind, what in KINDS.items())
    return join(
        tag("dl", *words, class_="words"), tag("h3", "Kinds of messages"), tag("dl", *kinds, class_="words")
    )


# Small pieces


def _kind(crossing: Crossing) -> str:
    """What a message is, among the kinds that there are; "other" where a ledger names none of them."""
    name = crossing.kind if crossing.type == "parcel" else crossing.type
    return name if name in KINDS else "other"


def _total(tallies: Iterable[Tally]) -> Html:
    each = list(tallies)
    total = size(sum(tally.bytes for tally in each))
    return join(total, tag("small", count(sum(tally.count for tally in each), "message")))


def _epsilon(spends: Iterable[Mapping[str, int | str]]) -> str:
    """What was spent, added up: the plainest bound on several releases."""
    return f"{sum(int(spend['epsilon_e6']) for spend in spends) / 1e6:g}"


def _claimed(domain: DomainReport) -> Html:
    if not domain.privacy:
        return Html(DASH)
    return join(_epsilon(domain.privacy), tag("small", count(len(domain.privacy), "parcel")))


def _spend(domain: DomainReport) -> str:
    """Kind by kind, and of how many parcels: the claims of some bound nothing about the others."""
    said = []
    for kind in sorted({str(spend["kind"]) for spend in domain.privacy}):
        spends = [spend for spend in domain.privacy if spend["kind"] == kind]
        total = domain.sent[kind].count if kind in domain.sent else len(spends)
        of = "all answers together" if kind == Kind.FITNESS else f"{len(spends)} of {total}"
        delta = sum(int(spend["delta_e12"]) for spend in spends) / 1e12
        said.append(f"{kind}: epsilon {_epsilon(spends)}, delta {delta:g} claimed for {of}")
    return ", ".join(said) or "none claimed"


def _state(domain: DomainReport, present: bool) -> Html:
    if domain.findings:
        return tag("span", count(len(domain.findings), "finding"), " in its ledger", class_="lost")
    if not present:
        return tag("span", "its ledger is not in the bundle", class_="open")
    return tag("span", "no findings in its ledger", class_="kept")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _open(unacknowledged: int) -> Html:
    return tag("span", unacknowledged, class_="open" if unacknowledged else "")
