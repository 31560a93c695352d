"""The egress gate fails closed."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossing import BASE, RUN, TENSORS, Owner, Shore, make_catalog, make_metrics, make_vector
from safetensors.numpy import save_file

from clients.policy import EgressPolicy
from clients.privacy import AnswerLimits, privacy_of
from common.config import validate
from common.errors import ConfigError, GateError, VectorError
from common.files import sha256_bytes, sha256_file
from common.ledger import Crossing
from common.parcels import Codec, Header, Kind, Privacy
from common.payloads import encode_values
from common.revocation import Revocation
from common.tensorfile import read_index, rewrite, tensor_facts


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


def test_the_policys_own_tensor_rules(tmp_path: Path) -> None:
    policy = EgressPolicy(deny_tensors=("layer.* 8x4",))
    toys = Owner(tmp_path / "toys", Shore(tmp_path / "server"), policy=policy)
    assert "layer.weight [8, 4] may not leave" in _refused(toys, make_vector(tmp_path / "v"))


def _bits(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as unsigned numbers."""
    data, types = path.read_bytes(), {"F32": "<u4", "BF16": "<u2"}
    return {
        entry.name: np.frombuffer(data[entry.start : entry.start + entry.size_bytes], types[entry.dtype])
        for entry in read_index(path)
    }


def test_what_is_below_the_declared_codec_does_not_leave(toys: Owner, tmp_path: Path) -> None:
    plain = {name: values & 0xFFFF0000 for name, values in _bits(make_vector(tmp_path / "v")).items()}
    message = {name: values | 0x1234 for name, values in plain.items()}  # less than half of the last place
    sent = []
    for number, hidden in enumerate((plain, message)):
        path = tmp_path / f"hidden-{number}"
        save_file({name: v.view("<f4").reshape(TENSORS[name]) for name, v in hidden.items()}, path)
        header = toys.draft(path, codec=Codec.BF16, round=number)
        assert {fact.dtype for fact in header.tensors} == {"F32"}
        sent.append(toys.gate.release(header, path))
    first, second = (parcel.payload.read_bytes() for parcel in sent)
    assert first == second
    assert {n: v.tolist() for n, v in _bits(sent[1].payload).items()} == {
        name: (values >> 16).tolist() for name, values in plain.items()
    }
    for parcel in sent:
        header = Header.open(parcel.envelope, toys.key.public)
        assert header.payload_digest == sha256_bytes(first)
        assert header.payload_bytes == len(first)
        assert [fact.model_dump(mode="json") for fact in header.tensors] == tensor_facts(parcel.payload)
    assert toys.ledger[1].body["size_bytes"] == len(sent[1].envelope) + len(first)


def test_a_vector_leaves_in_one_form_however_it_was_written(toys: Owner, tmp_path: Path) -> None:
    path = make_vector(tmp_path / "v")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = sorted(header, reverse=True)
    parts, shuffled, end = [], {}, 0
    for name in names:  # other order of tensors, of fields, and other padding: all of it legal
        start, stop = header[name]["data_offsets"]
        parts.append(data[8 + size + start : 8 + size + stop])
        shuffled[name] = {
            "data_offsets": [end, end + stop - start],
            "shape": header[name]["shape"],
            "dtype": "F32",
        }
        end += stop - start
    text = json.dumps(shuffled, separators=(",", ":")).encode() + b" " * 21
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    sent = toys.gate.release(toys.draft(tmp_path / "w"), tmp_path / "w")
    assert sent.payload.read_bytes() == data != (tmp_path / "w").read_bytes()
    assert toys.gate.release(toys.draft(path, round=1), path).payload.read_bytes() == data


def test_nothing_beside_the_tensors_and_no_sign_of_zero(toys: Owner, tmp_path: Path) -> None:
    good = {name: np.full(shape, 0.5, np.float32) for name, shape in TENSORS.items()}
    save_file(good, tmp_path / "m", metadata={"note": "jane@example.com"})
    with pytest.raises(VectorError, match="metadata"):
        toys.draft(tmp_path / "m")
    header = toys.draft(make_vector(tmp_path / "v")).model_copy(
        update={
            "payload_digest": sha256_file(tmp_path / "m"),
            "payload_bytes": (tmp_path / "m").stat().st_size,
        }
    )
    with pytest.raises(GateError, match="metadata"):
        toys.gate.release(header, tmp_path / "m")
    good["layer.bias"] = np.array([0.0, -0.0, 0.25, -1e-45], np.float32)
    save_file(good, tmp_path / "z")
    for number, codec in enumerate((Codec.FP32, Codec.BF16)):
        parcel = toys.gate.release(toys.draft(tmp_path / "z", codec=codec, round=number), tmp_path / "z")
        bits = _bits(parcel.payload)["layer.bias"].tolist()
        assert bits[:2] == [0, 0]
        assert bits[3] == (0x80000001 if codec is Codec.FP32 else 0)
    assert [path for path in (toys.home / "outbox").iterdir() if path.name.startswith(".")] == []


def test_rounding_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    save_file({"x": values}, tmp_path / "x")
    rewrite(tmp_path / "x", tmp_path / "y", "BF16")
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    expected[expected == 0x8000] = 0
    assert np.array_equal(_bits(tmp_path / "y")["x"], expected)


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


def test_fitness(tmp_path: Path) -> None:
    limits = AnswerLimits(clip=2.0, noise_multiplier=20.0, max_answers=10)
    policy = EgressPolicy(kinds=(*EgressPolicy().kinds, Kind.FITNESS), answers=limits)
    toys, number = Owner(tmp_path / "toys", Shore(tmp_path / "server"), policy=policy), count()

    def offered(privacy: Privacy | None = None, **values: Any) -> str:
        payload = tmp_path / f"fitness-{next(number)}"
        payload.write_bytes(encode_values(values))
        header = toys.draft(payload, Kind.FITNESS, privacy=privacy or privacy_of(limits))
        try:
            toys.gate.release(header, payload)
        except GateError as err:
            return err.message
        return ""

    good = {"candidates": "c" * 64, "0000/loss_e3": 1999, "0001/loss_e3": 0}
    assert offered(**good) == ""
    assert "above what `answers.clip`" in offered(**{**good, "0000/loss_e3": 2001})
    assert "privacy facts" in offered(Privacy(), **{**good, "0000/loss_e3": 7})
    for wrong in (
        {"0000/loss_e3": 5}, {"candidates": "c" * 64}, {**good, "0003/loss_e3": 1}, {**good, "note": 5},
        {**good, "candidates": "done"}, {**good, "0000/loss_e3": 1.5}, {**good, "0000/loss_e3": -1},
    ):  # fmt: skip
        assert "fitness: " in offered(**wrong)
    plain = Owner(tmp_path / "plain", Shore(tmp_path / "other"))
    payload = tmp_path / "fitness"
    payload.write_bytes(encode_values(good))
    with pytest.raises(GateError, match="not allowed by the policy"):
        plain.gate.release(plain.draft(payload, Kind.FITNESS), payload)


def test_an_adapter_is_shared_by_its_owner_alone(toys: Owner, tmp_path: Path) -> None:
    vector = make_vector(tmp_path / "v")
    assert "'shared' is not allowed" in _refused(toys, vector, Kind.TASK_VECTOR, training={"shared": 1})


def test_card(toys: Owner, tmp_path: Path) -> None:
    card = make_metrics(tmp_path / "card", items=30, synthetic=1, users_bucket=200)
    toys.gate.release(toys.draft(card, Kind.DOMAIN_CARD), card)
    assert "buckets" in _refused(toys, make_metrics(tmp_path / "b", users_bucket=213), Kind.DOMAIN_CARD)
    assert "card field" in _refused(toys, make_metrics(tmp_path / "x", revenue=5), Kind.DOMAIN_CARD)


def test_a_revocation_is_of_a_vector_that_passed_here(toys: Owner, tmp_path: Path) -> None:
    vector, payload = toys.vector(), tmp_path / "revocation"
    for wrong in (
        Revocation("c" * 64, vector.header.payload_digest),
        Revocation(vector.digest, vector.header.payload_digest, ("c" * 64,)),
    ):
        payload.write_bytes(wrong.encode())
        assert "names a vector that passed here" in _refused(toys, payload, Kind.REVOCATION)
    assert "nothing else" in _refused(toys, make_metrics(tmp_path / "m"), Kind.REVOCATION)
    payload.write_bytes(Revocation(vector.digest, vector.header.payload_digest).encode())
    toys.gate.release(toys.draft(payload, Kind.REVOCATION), payload)


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
        validate({"min_user": 3}, EgressPolicy, where="policy.toml")
