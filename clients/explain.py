"""`isthmus client policy explain`: an owner's policy in plain words, and what a run could get at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients.home import ClientHome
from clients.policy import NEEDED, EgressPolicy, vector_bytes
from clients.privacy import Spent, spent
from clients.training import isolation
from common.config import RunConfig
from common.crossing import crossing_tensors
from common.errors import ModelError, PolicyError
from common.language.adapters import is_causal
from common.models.base import resolve_base
from common.parcels import Codec, Kind
from common.payloads import MAX_JSON_BYTES

NEVER = (
    "interactions, user ids, item ids that are not in the public catalog",
    "embedding tables (word, position and token types): their rows name the words of the data",
    "tensors that the base model does not train, with other shapes, values that are not finite, metadata",
    "free text: a reply or an error is a code; the text of an exception stays in this host's logs",
    "private keys, logs, the ledger, evaluations of single users, personal models",
)
LIMITS = (
    "a task vector says something about the data that it was trained on, and so does a metric",
    "traffic that does not pass the gate is not seen by it: a firewall keeps the host to the server's ports",
)
_WORDS = {
    Kind.DOMAIN_CARD: "domain card",
    Kind.CATALOG: "public catalog: item ids and the attributes chosen with `data prepare --public`",
    Kind.TASK_VECTOR: "task vector: what fine-tuning changed in the model",
    Kind.METRICS: "metrics",
    Kind.FITNESS: "fitness: one number for each candidate of a merge, its loss on your validation users",
    Kind.REVOCATION: "revocation: that your own vector may be merged no more",
}


def explanation(home: ClientHome) -> dict[str, Any]:
    """What may leave, as plain data; the base model is read for its tensors. Raises ConfigError."""
    policy = home.policy
    return {
        "schema": 1,
        "domain": home.config.domain,
        "policy": policy.model_dump(mode="json"),
        "data_channel": {kind.value: _kind(policy, kind) for kind in policy.kinds},
        "control_channel": {
            "reply_fields": list(policy.reply_fields),
            "values": "codes, digests and whole or rounded numbers; anything else becomes the code `error`",
            "others": "Flower's own messages, each screened by the wire gate: identifiers, numbers and times",
        },
        "never": list(NEVER),
        "at_most_a_run": {"bytes": policy.max_run_bytes, "parcels": policy.max_run_parcels},
        "metrics": {"names": _metrics(policy), "min_users": policy.min_users},
        "vector": _vector(home),
        "privacy": {
            "demanded": policy.privacy.demanded,
            **policy.privacy.model_dump(),
            "spent": dataclasses.asdict(spent(home.journal)),
        },
        "isolation": {"required": policy.require_isolation, "possible_here": isolation.possible()},
        "limits": list(LIMITS),
    }


def _kind(policy: EgressPolicy, kind: Kind) -> dict[str, Any]:
    limit = policy.max_payload_bytes
    by_kind: dict[Kind, dict[str, Any]] = {
        Kind.DOMAIN_CARD: {"fields": list(policy.card_fields)},
        Kind.TASK_VECTOR: {"facts_beside_it": list(policy.training_facts), "max_norm": policy.max_norm},
        Kind.METRICS: {"fields": _metrics(policy), "min_users": policy.min_users},
        Kind.FITNESS: policy.answers.model_dump(),
    }
    small = kind not in (Kind.CATALOG, Kind.TASK_VECTOR)
    max_bytes = min(limit, MAX_JSON_BYTES) if small else limit
    return {"what": _WORDS[kind], "max_bytes": max_bytes, **by_kind.get(kind, {})}


def _metrics(policy: EgressPolicy) -> list[str]:
    """Those that really can leave: the gate wants to see how many users are behind them."""
    able = Kind.METRICS in policy.kinds and Codec.JSON in policy.codecs
    return list(policy.metrics) if able and "users_bucket" in policy.training_facts else []


def _vector(home: ClientHome) -> dict[str, Any]:
    """The task vector of this owner's base model, and whether a run with it could begin at all."""
    try:
        base = resolve_base(home.config.base)
        adapts: dict[str, Any] = {"lora": {}, "instruction": {}} if is_causal(base) else {}
        tensors = crossing_tensors(base, RunConfig.model_validate(adapts))
    except ModelError as err:
        return {"problem": err.message}
    policy = home.policy
    return {
        "tensors": len(tensors),
        "adapter": bool(adapts),
        "may_not_leave": [name for name in sorted(tensors) if not policy.allows_tensor(name, tensors[name])],
        "codecs": {codec.value: _with_codec(policy, codec, tensors) for codec in (Codec.BF16, Codec.FP32)},
    }


def _with_codec(policy: EgressPolicy, codec: Codec, tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    demanded = {"mechanism": "dp-sgd", "epsilon": 1.0} if policy.privacy.demanded else {}
    config = RunConfig.model_validate({"training": {"vector_codec": codec.value}, "privacy": demanded})
    try:
        policy.check_run(config, tensors)
    except PolicyError as err:
        return {"bytes": vector_bytes(tensors, codec), "refused": err.message}
    return {"bytes": vector_bytes(tensors, codec), "refused": ""}


def in_words(found: dict[str, Any], path: Path) -> Iterator[str]:
    """The same as lines of text."""
    yield f"{path}: valid. What may leave {found['domain']}:"
    yield "\non the data channel, signed, each in the ledger before it is sent"
    for kind, fact in found["data_channel"].items():
        yield f"  {fact['what']}; at most {fact['max_bytes']:,} bytes"
        for name, label in (("fields", "only"), ("facts_beside_it", "beside it, in its header:")):
            if name in fact:
                yield f"    {label} {', '.join(fact[name]) or 'nothing'}"
        if kind == Kind.TASK_VECTOR.value:
            yield from _vector_in_words(found["vector"])
            if found["policy"]["share_adapter"]:
                yield "    an adapter is passed on to other domains of the run, under a pseudonym"
        if kind == Kind.FITNESS.value:
            yield _answers_in_words(fact)
    yield "  a signed receipt for each parcel that came in"
    missing = [kind.value for kind in NEEDED if kind.value not in found["data_channel"]]
    if missing:
        yield f"  not {', '.join(missing)}: every run is refused"
    yield "\non the control channel"
    yield f"  replies with {', '.join(found['control_channel']['reply_fields']) or 'nothing'}"
    yield f"    as {found['control_channel']['values']}"
    yield f"  {found['control_channel']['others']}"
    yield "\nnever"
    yield from (f"  {line}" for line in found["never"])
    most, metrics = found["at_most_a_run"], found["metrics"]
    yield f"\na run gets at most {most['bytes']:,} bytes in {most['parcels']} parcels"
    if metrics["names"]:
        yield f"metrics: {', '.join(metrics['names'])}; {metrics['min_users']} users or more behind each"
    else:
        yield "metrics: none leave"
    yield f"differential privacy: {_privacy_in_words(found['privacy'])}"
    isolated = found["isolation"]
    here = "has no network and no keys" if isolated["possible_here"] else "can reach the network and the keys"
    says = (
        "says so"
        if "isolated" in found["policy"]["training_facts"]
        else "does not say so: see training_facts"
    )
    otherwise = "refuses to train" if isolated["required"] else f"trains all the same, and {says}"
    yield f"the trainer {here} on this host; where it cannot be isolated, this domain {otherwise}"
    yield "\nand still"
    yield from (f"  {line}" for line in found["limits"])


def _privacy_in_words(privacy: dict[str, Any]) -> str:
    left = str(Spent(**privacy["spent"]))
    if not privacy["demanded"]:
        return f"not demanded, a vector may leave without it; {left}"
    limits = {"one vector": privacy["max_epsilon"], "all that ever left": privacy["max_total_epsilon"]}
    named = [f"epsilon {limit:g} for {what}" for what, limit in limits.items() if limit is not None]
    return f"at most {' and '.join(named)}, delta {privacy['max_delta']:g}, or no vector leaves; {left}"


def _answers_in_words(limits: dict[str, Any]) -> str:
    noise = f"noise {limits['noise_multiplier']:g}" if limits["noise_multiplier"] else "without noise"
    return (
        f"    about {limits['max_answers']} candidates in all, from {limits['min_users']} users or more, one "
        f"user's loss cut at {limits['clip']:g}; {noise}"
    )


def _vector_in_words(vector: dict[str, Any]) -> Iterator[str]:
    if "problem" in vector:
        yield f"    the base model cannot be read: {vector['problem']}"
        return
    whose = "an adapter of this base, with the default [lora]," if vector["adapter"] else "this base model"
    for codec, fact in vector["codecs"].items():
        said = f"refused: {fact['refused']}" if fact["refused"] else f"{fact['bytes']:,} bytes"
        yield f"    {vector['tensors']} tensors of {whose} in {codec}: {said}"
