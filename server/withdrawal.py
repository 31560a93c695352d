"""Withdrawing a domain's vector: it is revoked, and a model without it takes the place of the one with it.

A withdrawal is a run of its own, worked on like any other (`isthmus run status`, `stop`, kill -9):

    revoke      a signed `revocation` parcel names the vector and the models that hold it; from then on the
                vector is admitted and merged no more, and those models are given out no more. It is done when
                `withdraw` returns, with or without running services.
    merge       the published merge once more, from the vectors that are left
    tell        every domain of that run fetches the revocation, so it is in both ledgers. One that cannot be
                reached is waited for `TELL_S` at most: nobody can keep the others' model by being away.
    install     the other domains get the new model, as they get any universal model
    forget      the vector's file leaves the store; its header, receipt and ledger entries stay, and so do the
                models that the operator merged from it

What cannot be taken back: models that owners already have. Whoever has the model from before and the one
from after can compute the vector from the two where the merge is linear.
"""

from __future__ import annotations

import shutil
import time

from common.config import RunConfig
from common.errors import FederationError, suggest
from common.files import write_atomic
from common.ledger import Journal
from common.models.base import resolve_base
from common.orders import INSTALL, REVOKE, Candidate, Order
from common.parcels import EVERYONE, SERVER, Codec, Kind, Parcel, draft, seal_parcel
from common.progress import StatusFile
from common.revocation import Revocation
from server.asking import Asking
from server.federation import Control, GridLike, Outcome, ask_for_metrics
from server.home import ServerHome
from server.merge import run_merge
from server.results import amend_results, write_results
from server.rounds import (
    admitted,
    enter,
    finish,
    is_withdrawn,
    open_run,
    publish_universal,
    read_inputs,
    survey_of,
)
from server.runs import DONE, FAILED, STOPPED, Run, Withdrawal

TELL_S = 120.0
MIN_DOMAINS = 2  # a merge of one vector would give that vector to everybody
GIVEN_UP = (FAILED, STOPPED)


def withdraw(home: ServerHome, domain: str, run_id: str = "", *, remerge: bool = True) -> Run:
    """Revoke the vector that `domain` gave to a finished run, and return the run that publishes without it.

    `run_id` is the finished run or how it begins; empty: the newest that merged a vector of this domain.
    Again, it returns the same run, unless that one failed or was stopped. Raises FederationError when the
    domain or such a run is unknown, or when too few domains would be left.
    """
    source = _source(home, domain, run_id)
    with home.store.journal.locked():
        run = _withdrawal_of(home, source, domain, remerge=remerge) or _create(home, source, domain, remerge)
    revoke(home, run)
    return run


def _source(home: ServerHome, domain: str, run_id: str) -> Run:
    """The finished run whose vector of `domain` is meant."""
    names = [member.domain for member in home.members.all()]
    if domain not in names:
        raise FederationError(
            f"{domain!r} is not a member", next_step=suggest(domain, names, otherwise="the members are {}")
        )
    if run_id:
        run = home.runs.source(home.runs.get(run_id))
        if run.state["state"] != DONE:
            raise FederationError(
                f"{run.spec.run_id} is {run.state['state']}: it has published no model",
                next_step="wait for its end, or `isthmus run stop` it",
            )
        if domain not in run.merged_domains:
            raise FederationError(
                f"{run.spec.run_id} has merged no vector of {domain}",
                next_step=f"it merged those of {', '.join(run.merged_domains)}",
            )
        return run
    for run in reversed(home.runs.all()):
        if run.spec.withdrawal is None and run.state["state"] == DONE and domain in run.merged_domains:
            return run
    raise FederationError(f"no finished run has merged a vector of {domain}", next_step="isthmus run list")


def asked(home: ServerHome) -> list[dict[str, str]]:
    """Withdrawals that owners asked for (`isthmus client withdraw`) and nobody has begun: run and domain."""
    wishes = home.store.find(kind=Kind.REVOCATION)
    found = []
    for wish in wishes:
        said = Revocation.decode(home.store.read_bytes(wish.payload_digest))
        if home.store.journal.get(f"revocation/{said.vector}") is None:
            found.append({"run": wish.run, "domain": wish.sender})
    return found


def remaining(home: ServerHome, source: Run) -> list[str]:
    """The domains of `source` whose vectors are not withdrawn."""
    return [domain for domain in source.merged_domains if not is_withdrawn(home, source, domain)]


def _withdrawal_of(home: ServerHome, source: Run, domain: str, *, remerge: bool) -> Run | None:
    """The withdrawal of `domain` from `source` that is under way or done, or None."""
    for run in home.runs.all():
        fact = run.spec.withdrawal
        if fact is None or (fact.run, fact.domain) != (source.spec.run_id, domain):
            continue
        if (fact.remerge or not remerge) and run.state["state"] not in GIVEN_UP:
            return run
    return None


def _create(home: ServerHome, source: Run, domain: str, remerge: bool) -> Run:
    left = [name for name in remaining(home, source) if name != domain]
    if remerge:
        _check_enough(source, left)
    parcel = admitted(home, source, Kind.TASK_VECTOR, domain)
    members = tuple(name for name in left if not home.member(name).is_revoked)
    spec = source.spec
    return home.runs.create(
        _config(spec.config, quorum=min(1, len(members))),
        base_digest=spec.base_digest,
        tensors=spec.tensors,
        members=members,
        withdrawal=Withdrawal(spec.run_id, domain, parcel.digest, parcel.header.payload_digest, remerge),
    )


def _check_enough(source: Run, left: list[str]) -> None:
    needed = max(MIN_DOMAINS, source.spec.config.run.quorum)
    if len(left) < needed:
        raise FederationError(
            f"{len(left)} of the vectors of {source.spec.run_id} would be left, {needed} are needed",
            next_step="isthmus run withdraw DOMAIN --no-model revokes it and publishes no other model",
        )


def _config(config: RunConfig, *, quorum: int) -> RunConfig:
    """That of the withdrawal: only the published merge, and whoever can be reached installs it."""
    published = tuple(method for method in config.merge if method.label == config.publish)
    name = f"{config.run.name[:29]}-withdrawal"
    run = config.run.model_copy(update={"name": name, "quorum": quorum})
    return config.model_copy(update={"run": run, "merge": published})


# The revocation


def revoke(home: ServerHome, run: Run) -> Parcel:
    """The revocation of the withdrawn vector, sealed and published; the same one on every call."""
    fact = _fact(run)
    key = f"revocation/{fact.parcel}"
    with home.store.journal.locked():
        known = home.store.journal.get(key)
        if known is None:
            known = {"parcel": _seal_revocation(home, run).digest}
            home.store.journal.put(key, known)
        home.store.withdraw(fact.payload)
        for holder in _holders(home, run):
            for stored in home.store.find(direction="out", run=holder.spec.run_id):
                if stored.kind is not Kind.REVOCATION:
                    home.store.withdraw(stored.digest)
    parcel = home.store.get(known["parcel"])
    if parcel is None:
        raise FederationError(f"{key}: its parcel is gone", next_step="restore the store from a copy")
    return parcel


def _seal_revocation(home: ServerHome, run: Run) -> Parcel:
    fact = _fact(run)
    models = []
    for holder in _holders(home, run):
        key = f"published/{Kind.UNIVERSAL_MODEL}/{holder.spec.config.publish}"
        published = Journal(holder.folder / "journal.jsonl").get(key)
        models += [published["model_digest"]] if published else []
    payload = run.folder / "revocation.json"
    write_atomic(payload, Revocation(fact.parcel, fact.payload, tuple(models)).encode())
    header = draft(
        payload,
        kind=Kind.REVOCATION,
        run=fact.run,
        sender=SERVER,
        recipient=EVERYONE,
        base_digest=run.spec.base_digest,
        codec=Codec.JSON,
        checkpoint=home.ledger.tree_head(),
    )
    parcel = seal_parcel(header, payload, home.identity)
    home.store.publish(parcel)
    return parcel


def _holders(home: ServerHome, run: Run) -> list[Run]:
    """Every run that merged the withdrawn vector: the same request gives the same vector again."""
    fact = _fact(run)

    def holds(other: Run) -> bool:
        if fact.domain not in other.merged_domains:
            return False
        vector = admitted(home, home.runs.source(other), Kind.TASK_VECTOR, fact.domain)
        return vector.header.payload_digest == fact.payload

    return [other for other in home.runs.all() if holds(other)]


def _fact(run: Run) -> Withdrawal:
    if run.spec.withdrawal is None:
        raise FederationError(f"{run.spec.run_id} withdraws nothing", next_step="isthmus run list")
    return run.spec.withdrawal


# The run


def execute_withdrawal(grid: GridLike, home: ServerHome, run: Run) -> None:
    """Work through a withdrawal to its end. Raises IsthmusError; what is done by then is kept."""
    fact, source = _fact(run), home.runs.source(run)
    status = StatusFile(run.folder / "status.json", run=run.spec.run_id)
    control = Control(grid, home, run)
    journal = Journal(run.folder / "journal.jsonl")
    home.store.open_run(open_run(run, kinds=frozenset({Kind.METRICS})))
    parcel = revoke(home, run)

    enter(home, run, journal, status, "merge")
    merged = []
    if fact.remerge:
        domains = remaining(home, source)
        _check_enough(source, domains)
        inputs = read_inputs(home, source, domains)
        (method,) = run.spec.config.merge
        base = resolve_base(run.spec.config.base.model)
        config, work = run.spec.config, run.folder / "merges"
        asking = Asking(control, home, run, journal, inputs.vector_parcels)
        merged = [run_merge(method, base, inputs.taus, inputs.catalogs, config, work, status, asking=asking)]
        journal.put("contributed", {"delivered": domains, "lost": {}})
        survey_of(home, run)

    enter(home, run, journal, status, "tell")
    told = _tell(control, home, run, parcel, time.time() + TELL_S)  # anew after a kill: nobody was asked
    journal.put("told", {"delivered": told.delivered, "lost": told.lost})

    installed = Outcome()
    if fact.remerge:
        until_s = enter(home, run, journal, status, "install")
        universal = publish_universal(home, run, journal, merged[0], inputs)
        installed = ask_for_metrics(control, home, run, INSTALL, run.spec.members, [universal], until_s)

    enter(home, run, journal, status, "report")
    home.store.forget_object(fact.payload)
    shutil.rmtree(source.folder / "merges" / "embeddings", ignore_errors=True)  # some are of its model
    write_results(home, run, merged, installed.lost)
    amend_results(home, source, fact.domain, run)
    finish(home, run, status)


def _tell(control: Control, home: ServerHome, run: Run, parcel: Parcel, until_s: float) -> Outcome:
    """Let every domain of the source fetch the revocation, to Unix second `until_s`."""
    candidate = Candidate(run.spec.config.publish, parcel.digest, "")
    domains = home.runs.source(run).merged_domains
    standing = [domain for domain in domains if not home.member(domain).is_revoked]

    def order_for(domain: str) -> Order:
        spec = run.spec
        return Order(REVOKE, spec.run_id, domain, spec.config, spec.base_digest, (candidate,))

    def has_heard(domain: str, _says_done: bool) -> bool:
        return domain in home.store.acknowledged(parcel.digest)

    return control.collect(standing, order_for, has_heard, until_s, quorum=0)
