"""Orders: what the server asks a domain to do over the control channel, and the domain's short replies.

An order is a DSSE envelope signed with the server's identity key, so that nobody between the two (not
even Flower's own processes) can ask for anything. It says what is wanted, never how: the owner runs its
installed code. The configuration rides along as the JSON text of a `RunConfig`, without the server's paths.

    contribute   send card and catalog, fine-tune, send the task vector and the allowed metrics
    evaluate     fetch candidate vectors, evaluate each on the private test set, send the allowed metrics
    install      fetch the universal vector, verify, install, evaluate, send the allowed metrics
    revoke       fetch the revocation of a vector, remember it: neither that vector nor a model that holds it
                 is used again
    receive      fetch the adapters that the owners of the run share with each other, keep them
    score        fetch candidates of a merge as numbers, mix each from those adapters, send a loss for each

A reply is a flat record of codes, digests and numbers: `status` is `done`, `refused` (never ask again)
or `failed` (asking again may work), `code` names the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config import RunConfig, validate
from common.errors import IsthmusError, ParcelError
from common.signing import PublicKey, Sealed, SigningKey, seal
from common.statements import DIGEST_PATTERN, RUN_PATTERN

PAYLOAD_TYPE = "application/vnd.isthmus.order+json"
CONTRIBUTE, EVALUATE, INSTALL, REVOKE = "contribute", "evaluate", "install", "revoke"
RECEIVE, SCORE = "receive", "score"
ACTIONS = (CONTRIBUTE, EVALUATE, INSTALL, REVOKE, RECEIVE, SCORE)
LABEL_PATTERN = r"[a-z0-9][a-z0-9._-]{0,79}"
ROUND = {CONTRIBUTE: 0, EVALUATE: 1, INSTALL: 2, REVOKE: 3, RECEIVE: 4, SCORE: 5}

MAX_GENERATIONS = 10_000

DONE, REFUSED, FAILED = "done", "refused", "failed"


@dataclass(frozen=True)
class Candidate:
    """A merged vector to fetch: its label in tables, its parcel, and the digest of the resulting model.

    To revoke: the revocation's parcel under the label of the published merge, without a model. To receive: an
    adapter under its owner's pseudonym. To score: a generation's numbers under the label of their merge.
    """

    label: str
    parcel: str
    model_digest: str


@dataclass(frozen=True)
class Order:
    """One signed request. `round` follows from it and names the parcel of metrics or fitness that answers it.

    `generation` counts the orders to score of a run; it is 0 for other actions.
    """

    action: str
    run: str
    recipient: str
    config: RunConfig
    base_digest: str
    candidates: tuple[Candidate, ...] = ()
    generation: int = 0

    @property
    def round(self) -> int:
        """0 contribute, 1 evaluate, 2 install, 3 revoke, 4 receive, 5 and above score."""
        return ROUND[self.action] + self.generation

    @property
    def key(self) -> str:
        """Under which an owner's journal keeps it."""
        return f"order/{self.run}/{self.action}" + (f"/{self.generation}" if self.action == SCORE else "")

    def check_names(self) -> None:
        """Raise ParcelError unless run, labels and digests are what they must be: some become file names."""
        known = {method.label for method in self.config.merge}
        if self.action == RECEIVE:
            known = {candidate.label for candidate in self.candidates}
        if self.generation and self.action != SCORE:
            raise ParcelError("the server's order has a generation and nothing to score")
        labels = [candidate.label for candidate in self.candidates]
        digests = [self.base_digest, *(d for c in self.candidates for d in (c.parcel, c.model_digest))]
        if not re.fullmatch(RUN_PATTERN, self.run):
            raise ParcelError("the server's order names a run that cannot be a name")
        if len(set(labels)) < len(labels) or not all(
            label in known and re.fullmatch(LABEL_PATTERN, label) for label in labels
        ):
            raise ParcelError("the server's order has a candidate that no merge of the run makes")
        if not all(re.fullmatch(DIGEST_PATTERN, digest) for digest in digests if digest):
            raise ParcelError("the server's order has a malformed digest")

    def sign(self, key: SigningKey) -> bytes:
        """The sealed order as bytes."""
        statement = {
            "action": self.action,
            "run": self.run,
            "recipient": self.recipient,
            "config": json.dumps(self.config.for_owners().model_dump(mode="json"), sort_keys=True),
            "base_digest": self.base_digest,
            "candidates": [
                {"label": c.label, "parcel": c.parcel, "model_digest": c.model_digest}
                for c in self.candidates
            ],
            "generation": self.generation,
        }
        return seal(statement, key, payload_type=PAYLOAD_TYPE)

    @classmethod
    def open(cls, envelope: bytes, server: PublicKey, recipient: str) -> Order:
        """Verify and read. Raises SignatureError, ParcelError or ConfigError."""
        body = Sealed.parse(envelope).open(server, payload_type=PAYLOAD_TYPE)
        try:
            order = cls(
                action=_text(body, "action"),
                run=_text(body, "run"),
                recipient=_text(body, "recipient"),
                config=validate(
                    json.loads(_text(body, "config")), RunConfig, where="the run's configuration"
                ),
                base_digest=_text(body, "base_digest"),
                candidates=tuple(
                    Candidate(**{str(k): str(v) for k, v in c.items()}) for c in body["candidates"]
                ),
                generation=_count(body, "generation"),
            )
        except IsthmusError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
            raise ParcelError(f"the server's order is malformed: {type(err).__name__}") from None
        if order.action not in ACTIONS or set(body) != STATEMENT_FIELDS:
            raise ParcelError(f"the server's order asks for {order.action!r}; we know {', '.join(ACTIONS)}")
        order.check_names()
        if order.recipient != recipient:
            raise ParcelError(f"the order is for {order.recipient!r}, and this is {recipient!r}")
        return order


STATEMENT_FIELDS = {"action", "run", "recipient", "config", "base_digest", "candidates", "generation"}


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 <= value < MAX_GENERATIONS:
        raise TypeError(name)
    return value
