"""The egress gate fails closed."""

from pathlib import Path

import numpy as np
import pytest
from crossing import BASE, RUN, TENSORS, Owner, Shore, make_catalog, make_metrics, make_vector
from safetensors.numpy import save_file

from clients.egress import EgressPolicy
from common.config import validate
from common.errors import ConfigError, GateError
from common.ledger import Crossing
from common.parcels import Codec, Header, Kind


@pytest.fixture
def toys(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "toys", Shore(tmp_path / "server"))


def _refused(owner: Owner, payload: Path, kind: Kind = Kind.TASK_VECTOR, **changes: object) -> str:
    size = len(owner.ledger)
    with pytest.raises(GateError) as caught:
        owner.gate.release(owner.draft(payload, kind, **changes), payload)
    assert len(owner.ledger) == size
    return caught.value.message


def test_release_is_in_the_ledger_and_repeatable(toys: Owner) -> None:
    parcel = toys.vector()
    assert Header.open(parcel.envelope, toys.key.public).checkpoint.size == 0
    assert [(entry.body["direction"], entry.body["digest"]) for entry in toys.ledger] == [
        ("out", parcel.digest)
    ]
    toys.restart()
    assert toys.vector().envelope == parcel.envelope
    assert len(toys.ledger) == 1
    assert toys.gate.is_released(parcel.digest)
    assert not toys.gate.is_released("0" * 64)
    assert toys.vector(1).header.checkpoint.size == 1


@pytest.mark.parametrize("step", ["released/", "release/", "ledger"])
def test_a_crash_at_any_step_of_a_release(
    toys: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    payload = make_vector(tmp_path / "v")
    header = toys.draft(payload)
    put, record = toys.journal.put, toys.ledger.record_once

    def crash(key: str, value: dict) -> None:
        if key.startswith(step):
            raise KeyboardInterrupt
        put(key, value)

    def crash_in_ledger(crossing: Crossing) -> object:
        if step == "ledger":
            raise KeyboardInterrupt
        return record(crossing)

    with monkeypatch.context() as patch:
        patch.setattr(toys.journal, "put", crash)
        patch.setattr(toys.ledger, "record_once", crash_in_ledger)
        with pytest.raises(KeyboardInterrupt):
            toys.gate.release(header, payload)
    toys.restart()
    parcel = toys.gate.release(header, payload)
    assert toys.gate.is_released(parcel.digest)
    assert [entry.body["digest"] for entry in toys.ledger] == [parcel.digest]


def test_what_is_sent_is_the_copy_that_was_checked(toys: Owner) -> None:
    parcel = toys.vector()
    original = toys.home / "vector-0.safetensors"
    before = parcel.payload.read_bytes()
    original.write_bytes(b"changed later")
    assert parcel.payload.read_bytes() == before


def test_header_rules(toys: Owner, tmp_path: Path) -> None:
    vector = make_vector(tmp_path / "v")
    assert "agreed" in _refused(toys, vector, run="other")
    assert "agreed" in _refused(toys, vector, base_digest="1" * 64)
    assert "goes from" in _refused(toys, vector, sender="beauty")
    assert "goes from" in _refused(toys, vector, recipient="beauty")
    assert "not allowed" in _refused(toys, vector, Kind.CANDIDATE, codec=Codec.FP32)
    assert "buckets" in _refused(toys, vector, training={"users_bucket": 213})
    assert "domains" in _refused(toys, vector, training={"domains": 2})
    assert "expired" in _refused(toys, vector, created_s=1_000_000_000)


def test_tensor_rules(toys: Owner, tmp_path: Path) -> None:
    word = {**TENSORS, "embeddings.word_embeddings.weight": (50, 4)}
    toys.gate.agree(RUN, BASE, word)
    assert "embedding table" in _refused(toys, make_vector(tmp_path / "word", tensors=word))
    toys.gate.agree(RUN, BASE, TENSORS)
    assert "may be trained" in _refused(toys, make_vector(tmp_path / "x", tensors={**TENSORS, "x": (2,)}))
    assert "missing" in _refused(toys, make_vector(tmp_path / "y", tensors={"layer.bias": (4,)}))
    assert "shape" in _refused(toys, make_vector(tmp_path / "z", tensors={**TENSORS, "layer.weight": (4, 8)}))
    assert "dtype" in _refused(toys, make_vector(tmp_path / "v"), codec=Codec.BF16)


def test_value_rules(toys: Owner, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def vector(**values: np.ndarray) -> Path:
        good = {name: rng.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()}
        save_file(
            {**good, **{k.replace("_", "."): v.astype(np.float32) for k, v in values.items()}}, tmp_path / "v"
        )
        return tmp_path / "v"

    assert "NaN" in _refused(toys, vector(layer_bias=np.array([0, 0, np.nan, 0])))
    assert "norm" in _refused(toys, vector(layer_bias=np.full(4, 1e5)))
    rows = rng.normal(size=(8, 4))
    rows[:5] *= 1e-4
    assert "untouched" in _refused(toys, vector(layer_weight=rows))
    save_file({k: np.zeros(s, np.float32) for k, s in TENSORS.items()}, tmp_path / "zero")
    assert "norm" in _refused(toys, tmp_path / "zero")
    (tmp_path / "pickle").write_bytes(b"\x80\x04")
    header = toys.draft(make_vector(tmp_path / "good")).model_copy(update={"payload_bytes": 2})
    with pytest.raises(GateError):
        toys.gate.release(header, tmp_path / "pickle")


def test_catalog(toys: Owner, tmp_path: Path) -> None:
    path = make_catalog(tmp_path / "c", "toys")
    assert toys.gate.release(toys.draft(path, Kind.CATALOG), path).header.kind is Kind.CATALOG
    assert "another domain" in _refused(toys, make_catalog(tmp_path / "d", "beauty"), Kind.CATALOG)
    data = path.read_bytes()
    (tmp_path / "e").write_bytes(data[:4] + b"hidden" + data[4:])
    _refused(toys, tmp_path / "e", Kind.CATALOG)


def test_metrics(toys: Owner, tmp_path: Path) -> None:
    good = make_metrics(tmp_path / "m", **{"zero-shot/ndcg@10": 0.25, "recall@10": 0.1234567})
    assert b"0.123457" in toys.gate.release(toys.draft(good, Kind.METRICS), good).payload.read_bytes()
    for name in ("revenue", "secret-label/recall@10"):
        bad = make_metrics(tmp_path / "n", **{name: 0.5})
        assert "not allowed" in _refused(toys, bad, Kind.METRICS)
    assert "users_bucket" in _refused(toys, good, Kind.METRICS, round=1, training={"users_bucket": 20})
    assert "users_bucket" in _refused(toys, good, Kind.METRICS, round=1, training={})


def test_card(toys: Owner, tmp_path: Path) -> None:
    card = make_metrics(tmp_path / "card", items=30, synthetic=1, users_bucket=200)
    toys.gate.release(toys.draft(card, Kind.DOMAIN_CARD), card)
    assert "buckets" in _refused(toys, make_metrics(tmp_path / "b", users_bucket=213), Kind.DOMAIN_CARD)
    assert "card field" in _refused(toys, make_metrics(tmp_path / "x", revenue=5), Kind.DOMAIN_CARD)


def test_budget(tmp_path: Path) -> None:
    shore = Shore(tmp_path / "server")
    toys = Owner(tmp_path / "toys", shore, policy=EgressPolicy(max_run_parcels=2))
    toys.vector(0), toys.vector(1), toys.vector(1)
    with pytest.raises(GateError, match="2 parcels have left"):
        toys.vector(2)


def test_replies(toys: Owner) -> None:
    reply = toys.gate.release_reply({"status": "failed", "code": "ValueError: jane@example.com", "round": 1})
    assert reply == {"status": "failed", "code": "error", "round": 1}
    entry = toys.ledger[0].body
    assert (entry["direction"], entry["channel"], entry["type"]) == ("out", "control", "message")
    with pytest.raises(GateError, match="text"):
        toys.gate.release_reply({"text": "hello"})
    assert len(toys.ledger) == 1


def test_policy_is_strict() -> None:
    with pytest.raises(ConfigError, match="min_user"):
        validate({"min_user": 3}, EgressPolicy, where="client.toml")
