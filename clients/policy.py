"""The owner's policy: `policy.toml` in its home says what may leave. Only the owner writes it.

It overrides any run: what a run needs and the policy forbids is refused with the code `policy`, before
any training where that can be known (`EgressPolicy.check_run`), and at the gate in every case. The file is
read anew for each order; one that cannot be read, or is missing, lets nothing out at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from clients.privacy import AnswerLimits, PrivacyLimits
from common.config import Frozen, RunConfig, load_toml
from common.errors import ConfigError, PolicyError, suggest
from common.files import write_atomic
from common.parcels import TRAINING_FACTS, Codec, Kind
from common.tensorfile import ITEM_BYTES

POLICY = "policy.toml"
CARD_FIELDS = ("interactions_bucket", "items", "synthetic", "users_bucket")
REPLY_FIELDS = ("code", "parcel", "receipt", "round", "run", "status")
SENDABLE = (
    Kind.DOMAIN_CARD,
    Kind.CATALOG,
    Kind.TASK_VECTOR,
    Kind.METRICS,
    Kind.FITNESS,
    Kind.REVOCATION,
)
NEEDED = (Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR)
Shapes = Mapping[str, tuple[int, ...]]
SendableKind = Literal[
    Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR, Kind.METRICS, Kind.FITNESS, Kind.REVOCATION
]


class EgressPolicy(Frozen):
    """What this owner lets out. Defaults are what a run needs and no more."""

    kinds: tuple[SendableKind, ...] = Field(
        (Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR, Kind.METRICS, Kind.REVOCATION),
        description="Kinds of parcels that may leave. A run needs the first three, `withdraw` the last; with "
        "`fitness` the domain answers how good candidates of a merge are",
    )
    codecs: tuple[Codec, ...] = Field(
        (Codec.BF16, Codec.FP32, Codec.PARQUET, Codec.JSON),
        description="Payload formats that may leave. Tensors are rounded to bf16 where a run declares it",
    )
    allow_tensors: tuple[str, ...] = Field(
        ("*",),
        description="Tensors that a task vector may hold, out of the base model's own table without its "
        "embedding tables: name patterns (*, ?), or a name and a shape such as `*.weight 384x*`",
    )
    deny_tensors: tuple[str, ...] = Field(
        (), description="Tensors that never leave, in the same form; what is here counts more"
    )
    training_facts: tuple[str, ...] = Field(
        ("batch_size", "isolated", "items", "seconds", "steps", "users_bucket"),
        description="Numbers about training that a header may carry. Metrics need users_bucket",
    )
    card_fields: tuple[str, ...] = Field(
        CARD_FIELDS, description="Numbers that the domain card may carry; counts only as buckets"
    )
    metrics: tuple[str, ...] = Field(
        ("recall@10", "ndcg@10", "recall@3", "ndcg@3", "ndcg@1", "valid-answers"),
        description="Aggregate metrics that may leave. Empty: none, and the run goes on without them",
    )
    min_users: int = Field(
        50,
        ge=1,
        description="Users behind a metric, counted as a bucket (1, 2 or 5 times a power of ten, rounded "
        "down); fewer, and it stays here",
    )
    reply_fields: tuple[str, ...] = Field(
        REPLY_FIELDS, description="Fields of a reply on the control channel; codes, digests and numbers only"
    )
    max_norm: float = Field(1000.0, gt=0, description="L2 norm of a task vector, all tensors together")
    max_row_gap: float = Field(
        10.0,
        gt=1,
        description="How far apart the row norms of one tensor may be: rows nearly untouched would tell "
        "which, so such a tensor does not leave",
    )
    max_payload_bytes: int = Field(4 << 30, ge=1, description="Bytes of one payload")
    max_run_bytes: int = Field(8 << 30, ge=1, description="Payload bytes in one run")
    max_run_parcels: int = Field(128, ge=1, description="Parcels in one run")
    require_isolation: bool = Field(
        False,
        description="Refuse to train where the trainer cannot be kept from the network and the keys. "
        "Otherwise it trains, and says so",
    )
    share_adapter: bool = Field(
        False,
        description="Let the server pass this domain's adapter on, under its pseudonym, to the other domains "
        "of a run that merges by what domains answer; otherwise such a merge goes without it",
    )
    privacy: PrivacyLimits = Field(
        PrivacyLimits(),
        description="Differential privacy that a task vector must have to leave: max_epsilon of one, or "
        "max_total_epsilon of all that ever left. Without either it needs none",
    )

    answers: AnswerLimits = Field(
        AnswerLimits(),
        description="What may be answered about candidates, where `kinds` has `fitness`: how many in all, "
        "from how many users, each user's loss cut at `clip`, and noise",
    )

    @model_validator(mode="after")
    def _known_names(self) -> EgressPolicy:
        for field, known in (
            ("training_facts", TRAINING_FACTS),
            ("card_fields", CARD_FIELDS),
            ("reply_fields", REPLY_FIELDS),
        ):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"{field} has no {name[:40]!r}; {suggest(name, known)}")
        return self

    def allows_tensor(self, name: str, shape: Iterable[int]) -> bool:
        """Whether the patterns let this tensor out."""
        subject = f"{name} {'x'.join(map(str, shape))}"

        def matches(patterns: Iterable[str]) -> bool:
            return any(fnmatchcase(subject, p if " " in p else f"{p} *") for p in patterns)

        return matches(self.allow_tensors) and not matches(self.deny_tensors)

    def check_tensors(self, tensors: Shapes) -> None:
        """Raises PolicyError naming the first tensor that may not leave."""
        for name, shape in sorted(tensors.items()):
            if not self.allows_tensor(name, shape):
                raise PolicyError(
                    f"tensor {name} {list(shape)} may not leave, and a task vector holds every trainable one",
                    next_step="see allow_tensors and deny_tensors in policy.toml",
                )

    def check_run(self, config: RunConfig, tensors: Shapes) -> None:
        """Raises PolicyError if a run with this configuration needs what may not leave.

        `tensors` are the trainable ones of the run's base model. What depends on the data or on training
        (sizes of the catalog, norms, users behind a metric) only the gate can tell.
        """
        codec = Codec(config.training.vector_codec)
        size_bytes = vector_bytes(tensors, codec)
        kinds = [kind.value for kind in NEEDED if kind not in self.kinds]
        codecs = [c.value for c in (codec, Codec.PARQUET, Codec.JSON) if c not in self.codecs]
        for fine, needs, setting in (
            (not kinds, f"parcels of kind {', '.join(kinds)}", "kinds"),
            (not codecs, f"codec {', '.join(codecs)}", "codecs"),
            (size_bytes <= self.max_payload_bytes, f"a vector of {size_bytes} bytes", "max_payload_bytes"),
            (size_bytes <= self.max_run_bytes, f"a vector of {size_bytes} bytes", "max_run_bytes"),
            (self.max_run_parcels >= len(NEEDED), f"{len(NEEDED)} parcels", "max_run_parcels"),
        ):
            if not fine:
                raise PolicyError(
                    f"the run needs {needs}, which the policy forbids",
                    next_step=f"see {setting} in policy.toml",
                )
        self.check_tensors(tensors)
        self.privacy.check_run(config)


def vector_bytes(tensors: Shapes, codec: Codec) -> int:
    """Bytes of the values of a task vector; its file has some more for names."""
    return sum(math.prod(shape) for shape in tensors.values()) * ITEM_BYTES[codec.dtype]


def read_policy(home: Path) -> EgressPolicy:
    """The policy of an owner's home. Raises ConfigError naming file, key and the nearest known one."""
    path = home / POLICY
    if not path.exists():
        raise ConfigError(
            f"{path} is missing: without a policy nothing leaves",
            next_step=f"isthmus client policy write {home}",
        )
    return load_toml(path, EgressPolicy)


def write_policy(home: Path, policy: EgressPolicy | None = None) -> Path:
    """Write `policy.toml` with a comment for each key, unless there is one. Returns its path.

    Raises ConfigError where a file is there already.
    """
    try:
        write_atomic(home / POLICY, policy_text(policy or EgressPolicy()).encode(), replace=False)
    except FileExistsError:
        raise ConfigError(f"{home / POLICY} is there already", next_step="edit it, or remove it") from None
    return home / POLICY


def policy_text(policy: EgressPolicy) -> str:
    """The file: every key with its meaning."""
    values: dict[str, Any] = policy.model_dump(mode="json", exclude_none=True)
    parts = [_HEAD]
    for name, field in EgressPolicy.model_fields.items():
        parts += ["", *(f"# {line}" for line in _wrapped(f"{field.description}.")), _line(name, values[name])]
    return "\n".join(parts) + "\n"


def _line(name: str, value: Any) -> str:
    if isinstance(value, list):  # tomli_w puts one item on a line
        return f"{name} = [{', '.join(tomli_w.dumps({'x': item})[4:].strip() for item in value)}]"
    return tomli_w.dumps({name: value}).strip()


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100)


_HEAD = """\
# What may leave this domain. Nothing that the server sends changes this file, and no run overrides it.
# An unknown key is refused. It is read anew for each order. `isthmus client policy explain` says what
# it means."""
