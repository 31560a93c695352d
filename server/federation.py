"""One run, from the first order to the published model, over any Flower `Grid`.

What a domain has delivered is decided by the store of admitted parcels, never by its reply: a reply may
be lost with a Flower run, an admitted parcel is not. So a restarted server asks nobody for what it has,
merges nothing twice, and goes on where it stopped (the crash rule of the design).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict

from common.errors import FederationError
from common.orders import CONTRIBUTE, DONE, REFUSED, ROUND, Candidate, Order
from common.parcels import Kind
from server.home import ServerHome
from server.runs import Run

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = (2.0, 5.0, 15.0, 30.0)
MAX_FAILURES = 5
PATIENT_CODES = frozenset({"unreachable", "transport", "storage"})  # link or disk: ask until the deadline


class GridLike(Protocol):
    """The part of Flower's Grid that a run uses."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


@dataclass
class _Ask:
    """Where one domain stands within one action."""

    domain: str
    message_id: str | None = None
    failures: int = 0
    next_try_s: float = 0.0
    lost_as: str = ""
    says_done: bool = False


@dataclass
class Outcome:
    """Who delivered, and why the others did not."""

    delivered: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


class StoppedError(FederationError):
    """The operator asked for the run to end."""

    code = "stopped"


class Control:
    """Asks domains over the control channel until they delivered, were lost, or the deadline passed."""

    def __init__(
        self,
        grid: GridLike,
        home: ServerHome,
        run: Run,
        clock: Callable[[], float] = time.time,
        sleep_s: float = POLL_S,
    ) -> None:
        self._grid = grid
        self._home = home
        self._run = run
        self._clock = clock
        self._sleep_s = sleep_s
        self._deadline_s = run.spec.deadline_s

    def collect(
        self,
        domains: Iterable[str],
        order_for: Callable[[str], Order],
        has_delivered: Callable[[str, bool], bool],
        deadline_s: float,
        quorum: int | None = None,
    ) -> Outcome:
        """Send each domain its order until `has_delivered(domain, says_done)`, to Unix second `deadline_s`.

        `quorum` None is the run's. Raises StoppedError when the operator asked for it, FederationError
        below the quorum.
        """
        self._deadline_s = deadline_s
        quorum = self._run.spec.quorum if quorum is None else quorum
        asks = {domain: _Ask(domain) for domain in domains}
        delivered: list[str] = []
        while True:
            for domain in [
                d for d, ask in asks.items() if not ask.lost_as and has_delivered(d, ask.says_done)
            ]:
                delivered.append(domain)
                del asks[domain]
            waiting = [ask for ask in asks.values() if not ask.lost_as]
            if not waiting or self._clock() > deadline_s:
                break
            if self._run.stop_asked:
                raise StoppedError("the operator stopped the run")
            if len(delivered) + len(waiting) < quorum:
                break
            for ask in [ask for ask in waiting if ask.says_done]:
                ask.says_done = False
                self._failed(ask, "nothing-delivered")
            self._push([ask for ask in waiting if ask.message_id is None], order_for)
            self._pull(waiting)
            time.sleep(self._sleep_s)
        lost = {ask.domain: ask.lost_as or "deadline" for ask in asks.values()}
        if len(delivered) < quorum:
            reasons = ", ".join(f"{domain}: {why}" for domain, why in sorted(lost.items()))
            raise FederationError(
                f"{len(delivered)} domains delivered, the quorum is {quorum} ({reasons})",
                next_step="mend what kept them and start a new run; fine-tunings are kept",
            )
        return Outcome(sorted(delivered), lost)

    def _push(self, asks: list[_Ask], order_for: Callable[[str], Order]) -> None:
        now_s = self._clock()
        due = [ask for ask in asks if now_s >= ask.next_try_s]
        messages = []
        for ask in due:
            envelope = order_for(ask.domain).sign(self._home.identity)
            self._home.log_message("out", ask.domain, self._run.spec.run_id, envelope)
            record = RecordDict({"order": ConfigRecord({"envelope": envelope})})
            action = order_for(ask.domain).action
            messages.append(
                Message(
                    record,
                    int(self._home.member(ask.domain).node_id),
                    f"query.{action}",
                    ttl=max(60.0, self._deadline_s - now_s),
                )
            )
        if not messages:
            return
        for ask, message_id in zip(due, self._grid.push_messages(messages), strict=True):
            ask.message_id = message_id or None
            if not message_id:
                self._failed(ask, "unreachable")

    def _pull(self, asks: list[_Ask]) -> None:
        by_id = {ask.message_id: ask for ask in asks if ask.message_id is not None}
        if not by_id:
            return
        for message in self._grid.pull_messages(list(by_id)):
            ask = by_id.get(message.metadata.reply_to_message_id)
            if ask is None:
                continue
            ask.message_id = None
            if message.has_error():
                self._failed(ask, "unreachable")
                continue
            reply = dict(message.content.config_records.get("reply", {}))
            self._home.log_message(
                "in",
                ask.domain,
                self._run.spec.run_id,
                json.dumps(reply, sort_keys=True, default=str).encode(),
            )
            status, code = str(reply.get("status", "")), str(reply.get("code", "malformed-reply"))
            if status == REFUSED:
                ask.lost_as = code
                log.warning("%s refused: %s", ask.domain, code)
            elif status == DONE:
                ask.says_done = True
            else:
                self._failed(ask, code)

    def _failed(self, ask: _Ask, code: str) -> None:
        ask.message_id = None
        ask.failures += code not in PATIENT_CODES
        pause_s = RETRY_S[min(ask.failures, len(RETRY_S) - 1)]
        ask.next_try_s = self._clock() + pause_s
        log.warning("%s: %s; asking again in %.0f s", ask.domain, code, pause_s)
        if ask.failures >= MAX_FAILURES:
            ask.lost_as = code


def contribute(control: Control, home: ServerHome, run: Run) -> Outcome:
    """Round 0: every member's card, catalog, task vector and first metrics (an owner may allow none)."""
    spec = run.spec
    needed = (Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR)

    def has(domain: str, kind: Kind) -> bool:
        return bool(home.store.find(run=spec.run_id, kind=kind, sender=domain, round=0))

    def has_delivered(domain: str, says_done: bool) -> bool:
        return all(has(domain, kind) for kind in needed) and (says_done or has(domain, Kind.METRICS))

    def order_for(domain: str) -> Order:
        return Order(CONTRIBUTE, spec.run_id, domain, spec.config, spec.base_digest)

    return control.collect(spec.members, order_for, has_delivered, spec.deadline_s)


def ask_for_metrics(
    control: Control,
    home: ServerHome,
    run: Run,
    action: str,
    domains: Iterable[str],
    candidates: list[Candidate],
    deadline_s: float,
) -> Outcome:
    """Rounds 1 and 2: let the domains evaluate (or install and evaluate) merged vectors."""
    spec = run.spec

    def has_delivered(domain: str, says_done: bool) -> bool:
        return says_done or bool(
            home.store.find(run=spec.run_id, kind=Kind.METRICS, sender=domain, round=ROUND[action])
        )

    def order_for(domain: str) -> Order:
        return Order(action, spec.run_id, domain, spec.config, spec.base_digest, tuple(candidates))

    return control.collect(domains, order_for, has_delivered, deadline_s)
