"""What an owner does when it is asked (`common.orders`): each once, whatever is killed.

Every fact is journaled before the next step begins: the order before the work, the sealed parcel before
the upload, the receipt before the reply. So the same order asked twice (by a server that lost its
memory, or by a runner that was killed) trains nothing again and sends nothing that was accepted.
Heavy work runs in a process of its own (`clients.training`), so that this one stays small.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from clients.cosigning import exchange_checkpoints
from clients.data.domain import Domain
from clients.exchange_client import ExchangeClient
from clients.home import ClientHome
from clients.privacy import privacy_of, read_claim, spent
from clients.serving import COMPARISON, OWN, UNIVERSAL, install, set_own_model
from clients.training import isolation
from clients.training.job import Candidate, Job, run_job
from common.catalog import Catalog
from common.config import RunConfig
from common.crossing import crossing_tensors
from common.errors import BaseMismatchError, GateError, ParcelError, PolicyError, RefusedError, TransportError
from common.files import sha256_bytes, sha256_file, write_atomic
from common.models.base import model_digest, resolve_base
from common.orders import CONTRIBUTE, EVALUATE, INSTALL, RECEIVE, REVOKE, SCORE, Order
from common.parcels import SERVER, Codec, Kind, Privacy, bucket, draft
from common.payloads import encode_values, fitness_values
from common.progress import StatusFile
from common.revocation import Revocation

log = logging.getLogger(__name__)
ZERO_SHOT, FINE_TUNED = "zero-shot", "fine-tuned"
POOL = "pool.json"  # which adapters the server sent, with the files of them


class Actions:
    """Carries out orders for one owner."""

    def __init__(self, home: ClientHome) -> None:
        self._home = home
        self._status = StatusFile(home.status_path, domain=home.config.domain)
        self._exchange = ExchangeClient(home.config.server.exchange, home.tls, home.gate, home.server_key)
        self._sent_bytes = sum(
            int(entry.body["size_bytes"])
            for entry in home.ledger
            if entry.body["direction"] == "out" and entry.body["type"] == "parcel"
        )

    def carry_out(self, order: Order, envelope: bytes) -> None:
        """Do what `order` says unless it was done. Raises IsthmusError."""
        key = order.key
        fact = {"digest": sha256_bytes(envelope), "envelope": envelope.decode("ascii"), "done": False}
        known = self._home.journal.get(key)
        if known == {**fact, "done": True}:
            return
        base = resolve_base(self._home.config.base)
        self._check_base(order, base)
        tensors = crossing_tensors(base, order.config)
        if order.action == CONTRIBUTE:
            self._home.policy.check_run(order.config, tensors)
            if self._home.policy.require_isolation and not isolation.possible():
                raise PolicyError(isolation.IMPOSSIBLE, next_step=isolation.IMPOSSIBLE_STEP)
        if order.action in (RECEIVE, SCORE) and Kind.FITNESS not in self._home.policy.kinds:
            raise PolicyError(
                "the run merges by what domains answer about candidates, which the policy forbids",
                next_step="see kinds and answers in policy.toml",
            )
        self._home.gate.agree(order.run, order.base_digest, tensors, labels_of(order.config))
        self._home.journal.put(key, fact)
        steps = {
            CONTRIBUTE: self._contribute,
            EVALUATE: self._evaluate,
            INSTALL: self._install,
            REVOKE: self._revoke,
            RECEIVE: self._receive,
            SCORE: self._score,
        }
        steps[order.action](order, base)
        self._watch()
        self._home.journal.put(key, {**fact, "done": True})
        self._home.keep_checkpoint()
        self._status(phase=f"{order.action}: done")

    def _watch(self) -> None:
        """Look at the other ledgers. Raises ProofError when the server shows another history."""
        try:
            exchange_checkpoints(self._home)
        except (TransportError, RefusedError) as err:
            log.warning("checkpoints were not exchanged: %s", err.message)

    def unfinished(self) -> list[bytes]:
        """Orders that were accepted and not finished."""
        facts = [fact for _, fact in self._home.journal.items("order/") if not fact["done"]]
        return [fact["envelope"].encode("ascii") for fact in facts]

    def _contribute(self, order: Order, base: Path) -> None:
        domain = Domain.load(self._home.data_folder)
        work = self._home.work(order.run)
        limited = self._home.config.release.max_tpr is not None
        result = self._train(order, base) if limited else {}  # over the limit nothing at all is sent
        with self._timed("catalog"):
            self._send_card_and_catalog(order, domain, work)
        result = result or self._train(order, base)
        facts = {
            "steps": result["steps"],
            "seconds": int(result["seconds"]),
            "batch_size": order.config.training.batch_size,
            "items": len(domain.item_ids),
            "users_bucket": bucket(result["users"]),
            "isolated": int(result["isolated"]),
            **({"shared": 1} if self._home.policy.share_adapter else {}),
        }
        with self._timed("upload"):
            codec = Codec(order.config.training.vector_codec)
            self._send(order, Kind.TASK_VECTOR, self._in_work(result["vector_path"]), codec, facts)
        set_own_model(self._home.path, self._in_work(result["model_folder"]), order.config)
        self._send_metrics(order, result)

    def _train(self, order: Order, base: Path) -> dict[str, Any]:
        with self._timed("train"):
            return self._job(order, base, "fit")

    def _send_card_and_catalog(self, order: Order, domain: Domain, work: Path) -> None:
        public = domain.catalog()
        catalog = work / "catalog.parquet"
        Catalog(self._home.config.domain, public.item_ids, public.attributes).write(catalog)
        card = {
            "items": len(domain.item_ids),
            "users_bucket": bucket(len(domain.user_ids)),
            "interactions_bucket": bucket(domain.interactions),
            "synthetic": int(domain.synthetic),
        }
        allowed = {name: value for name, value in card.items() if name in self._home.policy.card_fields}
        write_atomic(work / "card.json", encode_values(allowed))
        self._send(order, Kind.DOMAIN_CARD, work / "card.json", Codec.JSON, {})
        self._send(order, Kind.CATALOG, catalog, Codec.PARQUET, {})

    def _evaluate(self, order: Order, base: Path) -> None:
        with self._timed("download"):
            candidates = self._fetch(order)
        with self._timed("evaluate"):
            result = self._job(order, base, "candidates", candidates)
        self._send_metrics(order, result)
        for candidate in candidates:
            Path(candidate.vector).unlink(
                missing_ok=True
            )  # the ledger keeps the digest, the server the bytes

    def _install(self, order: Order, base: Path) -> None:
        with self._timed("download"):
            (universal,) = self._fetch(order)
        with self._timed("install"):
            kept = universal.model_copy(update={"label": UNIVERSAL, "keep": True})
            result = self._job(order, base, "candidates", [kept])
            composed = self._in_work(result["evaluations"][UNIVERSAL]["model_folder"])
            digest = universal.model_digest
            installed = install(self._home.path, composed, base, digest, config=order.config)
            shutil.rmtree(composed)
        self._compare(order, installed, result["evaluations"][UNIVERSAL]["metrics"])
        self._send_metrics(order, result)

    def _revoke(self, order: Order, _base: Path) -> None:
        """Remember which vector was withdrawn and which models hold it (`ClientHome.is_withdrawn`)."""
        folder = self._home.work(order.run) / "candidates"
        for wanted in order.candidates:
            parcel = self._exchange.fetch(wanted.parcel, folder)
            header = parcel.header
            if (header.kind, header.base_digest) != (Kind.REVOCATION, order.base_digest):
                raise ParcelError("what the server gave is not a revocation about this base model")
            said = Revocation.decode(parcel.payload.read_bytes())
            for digest in (said.payload, *said.models):
                self._home.journal.put(f"withdrawn/{digest}", {"run": header.run})
            for adapter in self._home.path.glob("work/*/pool/*.payload"):
                if sha256_file(adapter) == said.payload:
                    adapter.unlink()

    def _receive(self, order: Order, _base: Path) -> None:
        """Keep the adapters that owners shared: what later candidates are mixtures of."""
        with self._timed("download"):
            adapters = self._fetch(order, "pool")
        record = [adapter.model_dump() for adapter in adapters]
        write_atomic(self._home.work(order.run) / POOL, json.dumps(record).encode())

    def _score(self, order: Order, base: Path) -> None:
        """Answer a generation of candidates with one loss each (`clients.fitness`)."""
        work = self._home.work(order.run)
        try:
            adapters = [Candidate(**record) for record in json.loads((work / POOL).read_bytes())]
        except FileNotFoundError:
            raise ParcelError("the server asks about mixtures of adapters that it never sent") from None
        (generation,) = self._fetch(order, "generations")
        numbers = Path(generation.vector)
        with self._timed("answers"):
            result = self._job(order, base, "answers", adapters, numbers)
        path = work / f"{order.generation}.fitness.json"
        write_atomic(path, encode_values(fitness_values(sha256_file(numbers), result["losses_e3"])))
        facts = {"users_bucket": bucket(result["users"])}
        self._send(order, Kind.FITNESS, path, Codec.JSON, facts)
        shutil.rmtree(numbers.parent)

    def _compare(self, order: Order, installed: Path, universal: Mapping[str, float]) -> None:
        """Keep beside the model how it and the domain's own do on the test users; say where it is worse."""
        path = self._home.work(order.run) / "evaluations" / f"{FINE_TUNED}.json"
        if not path.is_file():
            return  # this owner did not fine-tune in this run
        own = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        record = {UNIVERSAL: dict(universal), OWN: own}
        write_atomic(installed / COMPARISON, (json.dumps(record, indent=1) + "\n").encode())
        metric = f"ndcg@{order.config.evaluation.k}"
        if universal[metric] < own[metric]:
            log.warning(
                "the universal model ranks worse here than this domain's own model: see client status"
            )

    def _fetch(self, order: Order, place: str = "candidates") -> list[Candidate]:
        folder = self._home.work(order.run) / place
        found = []
        for number, wanted in enumerate(order.candidates):
            self._status(phase="download", step=number, total=len(order.candidates))
            parcel = self._exchange.fetch(wanted.parcel, folder)
            header, kind = parcel.header, Kind.UNIVERSAL_MODEL if order.action == INSTALL else Kind.CANDIDATE
            if (header.base_digest, header.run, header.kind) != (order.base_digest, order.run, kind):
                raise BaseMismatchError("a merged vector is for another base model, run or purpose")
            found.append(
                Candidate(
                    label=wanted.label,
                    vector=str(parcel.payload),
                    codec=parcel.header.codec.value,
                    model_digest=wanted.model_digest,
                )
            )
        return found

    def _job(
        self,
        order: Order,
        base: Path,
        mode: Literal["fit", "candidates", "answers"],
        candidates: Sequence[Candidate] = (),
        numbers: Path | None = None,
    ) -> dict[str, Any]:
        """Run the trainer's process; what it did before is not done again."""
        job = Job(
            mode=mode,
            domain=str(self._home.data_folder),
            base=str(base),
            work=str(self._home.work(order.run)),
            fits=str(self._home.fits),
            config=self._limited(order.config),
            status=str(self._home.status_path),
            candidates=tuple(candidates),
            numbers=str(numbers or ""),
            answers=self._home.policy.answers,
            limits=self._home.policy.privacy,
            epsilon_spent=spent(self._home.journal).epsilon,
            home=str(self._home.path),
            require_isolation=self._home.policy.require_isolation,
            release=self._home.config.release,
        )
        result = run_job(job)
        if not result["isolated"]:
            log.warning("the trainer could have reached the network and the keys: see client policy explain")
        return result

    def _in_work(self, path: str) -> Path:
        """What the trainer names as its result; it could name anything. Raises GateError."""
        found = Path(path).resolve()
        if not found.is_relative_to(self._home.path / "work"):
            raise GateError("the trainer named a result outside its folder", next_step="see trainer.log")
        return found

    def _limited(self, config: RunConfig) -> RunConfig:
        """The run's configuration under the owner's own limit of training time."""
        own = self._home.config.max_training_minutes
        if own is None:
            return config
        minutes = min(own, config.training.max_minutes or own)
        return config.model_copy(
            update={"training": config.training.model_copy(update={"max_minutes": minutes})}
        )

    def _send_metrics(self, order: Order, result: Mapping[str, Any]) -> None:
        """The aggregates that the owner allowed; none when too few users are behind them."""
        policy = self._home.policy
        evaluations = result["evaluations"]
        values = {
            f"{label}/{metric}": value
            for label, evaluation in evaluations.items()
            for metric, value in evaluation["metrics"].items()
            if metric in policy.metrics
        }
        users = bucket(min((evaluation["users"] for evaluation in evaluations.values()), default=0))
        if not values or users < policy.min_users or "users_bucket" not in policy.training_facts:
            log.warning("no metrics leave: the policy allows none, or fewer than %d users", policy.min_users)
            return
        path = self._home.work(order.run) / f"{order.action}.metrics.json"
        write_atomic(path, encode_values(values))
        self._send(order, Kind.METRICS, path, Codec.JSON, {"users_bucket": users})

    def _send(self, order: Order, kind: Kind, payload: Path, codec: Codec, facts: Mapping[str, int]) -> None:
        allowed = self._home.policy.training_facts
        header = draft(
            payload,
            kind=kind,
            run=order.run,
            sender=self._home.config.domain,
            recipient=SERVER,
            base_digest=order.base_digest,
            codec=codec,
            round=order.round,
            training={name: value for name, value in facts.items() if name in (*allowed, "shared")},
            privacy=self._privacy(kind, payload),
        )
        parcel = self._home.gate.release(header, payload)
        size, before = parcel.header.payload_bytes, self._sent_bytes

        def across(done: int) -> None:
            self._sent_bytes = before + done
            self._status(phase=f"send {kind}", step=done, total=size, bytes_sent=self._sent_bytes)

        self._exchange.send(parcel, across)
        across(size)

    def _privacy(self, kind: Kind, payload: Path) -> Privacy | None:
        """What a header says of this payload's privacy."""
        if kind is Kind.TASK_VECTOR:
            return read_claim(payload)
        return privacy_of(self._home.policy.answers) if kind is Kind.FITNESS else None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `seconds.json`, for the owner's own records."""
        self._status(phase=phase, bytes_sent=self._sent_bytes)
        path, started_s = self._home.path / "seconds.json", monotonic()
        yield
        seconds = json.loads(path.read_bytes()) if path.exists() else {}
        seconds[phase] = round(seconds.get(phase, 0.0) + monotonic() - started_s, 2)
        write_atomic(path, json.dumps(seconds).encode())

    def _check_base(self, order: Order, base: Path) -> None:
        own = model_digest(base)
        if own != order.base_digest:
            raise BaseMismatchError(
                f"this owner's base model is {own[:12]}, the run's is {order.base_digest[:12]}",
                next_step="install the run's base model, or set `base` in client.toml",
            )


def labels_of(config: RunConfig) -> set[str]:
    """Every model that the metrics of a run may speak of."""
    return {ZERO_SHOT, FINE_TUNED, UNIVERSAL, *(method.label for method in config.merge)}
