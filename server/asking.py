"""What a merge may ask the domains of its run: the loss of each candidate, on data that stays with them.

Once a run, each domain that answers fetches the adapters that their owners share (`receive`), under
pseudonyms. From then on a generation of candidates is one parcel of 2N numbers each (`score`), and each
domain's answer one parcel of as many whole numbers. Both are kept by the digest of the numbers, so a search
that goes on after a kill asks nobody for what was answered. All domains are asked side by side.

Who answered the first order must answer every other: the loss of a candidate is a mean over the same domains
throughout, or candidates could not be compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.config import RunConfig
from common.errors import FederationError
from common.files import sha256_file
from common.language.pool import Candidate as Mixture
from common.ledger import Journal
from common.orders import RECEIVE, ROUND, SCORE, Candidate, Order
from common.parcels import EVERYONE, SERVER, Codec, Kind, Parcel, draft, seal_parcel
from common.payloads import CANDIDATES, THOUSANDTHS
from server.evolution.options import EvolutionOptions
from server.federation import Control
from server.home import ServerHome
from server.language.registry import DOMAINS, Domains
from server.runs import Run


def generations_of(config: RunConfig, adapters: int) -> int:
    """How many generations a run of so many adapters asks its domains about, at most; mostly 0."""
    found = 0
    for method in config.merge:
        if config.lora is not None and method.options.get("fitness") == DOMAINS:
            fields = EvolutionOptions.model_fields
            given = {name: value for name, value in method.options.items() if name in fields}
            found += sum(EvolutionOptions(**given).iterations(adapters)) + 2  # and both stages' starts
    return found


@dataclass
class Asking:
    """The domains of one run that may be asked: those whose vectors are in `parcels`."""

    control: Control
    home: ServerHome
    run: Run
    journal: Journal
    parcels: Mapping[str, Parcel]

    def domains(self, label: str) -> Domains:
        """What the merge called `label` sees of them."""
        shared = {
            domain: self.home.pseudonym(domain)
            for domain, parcel in sorted(self.parcels.items())
            if parcel.header.training.get("shared") == 1
        }
        return Domains(shared, partial(self.losses, label))

    def losses(self, label: str, candidates: Sequence[Mixture]) -> dict[str, list[float]]:
        """Each answering domain's loss of each candidate, in nats a token.

        Raises FederationError when nobody answers, or one that answered before does not.
        """
        domains = self._answering(label)
        number, payload, parcel = self._published(label, candidates)
        config, spec = self.run.spec.config, self.run.spec

        def order_for(domain: str) -> Order:
            wanted = (Candidate(label, parcel, ""),)
            return Order(SCORE, spec.run_id, domain, config, spec.base_digest, wanted, number)

        def has_delivered(domain: str, _says_done: bool) -> bool:
            return self._answer(domain, number, payload, len(candidates)) is not None

        self.control.collect(domains, order_for, has_delivered, self._until_s(), quorum=len(domains))
        return {domain: self._answer(domain, number, payload, len(candidates)) or [] for domain in domains}

    def _answering(self, label: str) -> list[str]:
        """The domains that have the shared adapters and will answer; the same on every call."""
        known = self.journal.get("answering")
        if known is None:
            spec = self.run.spec
            adapters = tuple(
                Candidate(pseudonym, self._share(domain), "")
                for domain, pseudonym in sorted(self.domains(label).shared.items(), key=lambda item: item[1])
            )

            def order_for(domain: str) -> Order:
                return Order(RECEIVE, spec.run_id, domain, spec.config, spec.base_digest, adapters)

            outcome = self.control.collect(
                [domain for domain in self.parcels if not self.home.member(domain).is_revoked],
                order_for,
                lambda _domain, says_done: says_done,
                self._until_s(),
                quorum=1,
            )
            known = {"domains": outcome.delivered, "lost": outcome.lost}
            self.journal.put("answering", known)
        return list(known["domains"])

    def _share(self, domain: str) -> str:
        """The parcel in which the others get the domain's adapter; the same on every call."""
        parcel = self.parcels[domain]
        if self.home.store.is_withdrawn(parcel.header.payload_digest):
            raise FederationError(f"withdrawn: the vector of {domain} is given to nobody any more")
        return self._sealed(f"shared/{domain}", parcel.payload, parcel.header.codec, ROUND[RECEIVE])

    def _published(self, label: str, candidates: Sequence[Mixture]) -> tuple[int, str, str]:
        """The generation's number, the digest of its numbers, and its parcel."""
        from common.language.generation import write_generation

        folder = self.run.folder / "merges" / label / "generations"
        written = folder / "next.safetensors"
        write_generation(written, candidates)
        digest = sha256_file(written)
        key = f"generation/{label}/{digest}"
        known = self.journal.get(key)
        if known is None:
            known = {"number": sum(1 for _ in self.journal.items("generation/"))}
            self.journal.put(key, known)
        number = int(known["number"])
        path = written.rename(folder / f"{number:04d}.safetensors")
        return number, digest, self._sealed(f"numbers/{digest}", path, Codec.FP32, ROUND[SCORE] + number)

    def _sealed(self, key: str, payload: Path, codec: Codec, round_: int) -> str:
        """The parcel of this payload for every member, published once."""
        known = self.journal.get(f"published/{key}")
        if known is None:
            header = draft(
                payload,
                kind=Kind.CANDIDATE,
                run=self.run.spec.run_id,
                sender=SERVER,
                recipient=EVERYONE,
                base_digest=self.run.spec.base_digest,
                codec=codec,
                round=round_,
                checkpoint=self.home.ledger.tree_head(),
            )
            parcel = seal_parcel(header, payload, self.home.identity)
            self.home.store.publish(parcel)
            known = {"parcel": parcel.digest}
            self.journal.put(f"published/{key}", known)
        return str(known["parcel"])

    def _answer(self, domain: str, number: int, payload: str, count: int) -> list[float] | None:
        """What the domain said of these candidates, or None."""
        for stored in self.home.store.find(
            run=self.run.spec.run_id, kind=Kind.FITNESS, sender=domain, round=ROUND[SCORE] + number
        ):
            values = json.loads(self.home.store.read_bytes(stored.payload_digest))
            if values.pop(CANDIDATES) == payload and len(values) == count:
                return [values[name] / THOUSANDTHS for name in sorted(values)]
        return None

    def _until_s(self) -> float:
        return time.time() + 60.0 * self.run.spec.config.run.deadline_minutes
