"""policy.toml: strict, written with its meaning, and stronger than any run."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.cli import app
from clients.home import ClientConfig, ClientHome, ServerAddress
from clients.policy import EgressPolicy, policy_text, read_policy, write_policy
from clients.training import isolation
from common.config import RunConfig
from common.errors import ConfigError, GateError, PolicyError
from common.models.base import trainable_tensors
from common.parcels import Codec, Kind

TENSORS = {"encoder.0.bias": (4,), "encoder.0.weight": (8, 4), "pooler.weight": (4, 4)}
ADDRESS = ServerAddress(
    name="lab", fleet="h:1", exchange="h:2", enrol="h:3", public_key="0" * 64, log_key="1" * 64
)


def test_the_file_says_what_each_key_means_and_reads_back(tmp_path: Path) -> None:
    policy = EgressPolicy(metrics=(), min_users=77, deny_tensors=("pooler.* 4x4",), kinds=(Kind.CATALOG,))
    write_policy(tmp_path, policy)
    assert read_policy(tmp_path) == policy
    text = (tmp_path / "policy.toml").read_text()
    lines = text.splitlines()
    for key in EgressPolicy.model_fields:
        place = next(n for n, line in enumerate(lines) if line.startswith((f"{key} = ", f"[{key}]")))
        assert lines[place - 1].startswith("# ")
    assert EgressPolicy.model_validate(tomllib.loads(policy_text(EgressPolicy()))) == EgressPolicy()
    with pytest.raises(ConfigError, match="there already"):
        write_policy(tmp_path)
    assert (tmp_path / "policy.toml").read_text() == text


@pytest.mark.parametrize(
    ("line", "says", "next_step"),
    [
        ("min_user = 3", "unknown key 'min_user'", "did you mean 'min_users'?"),
        ('kinds = ["candidate"]', "kinds.0", "mend"),
        ('kinds = ["task-vektor"]', "kinds.0", "mend"),
        ('codecs = ["pickle"]', "codecs.0", "mend"),
        ('training_facts = ["users_buckets"]', "did you mean 'users_bucket'", "mend"),
        ('card_fields = ["revenue"]', "card_fields has no 'revenue'", "mend"),
        ('reply_fields = ["text"]', "reply_fields has no 'text'", "mend"),
        ("max_norm = inf\nmax_norm = 1", "not valid TOML", "mend that line"),
        ("min_users = 0", "min_users", "mend"),
        ("require_isolation = 3", "require_isolation", "mend"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, says: str, next_step: str) -> None:
    (tmp_path / "policy.toml").write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path)
    assert str(tmp_path / "policy.toml") in caught.value.message
    assert says in caught.value.message
    assert next_step in caught.value.next_step


def test_patterns_of_tensors() -> None:
    policy = EgressPolicy(allow_tensors=("encoder.*",), deny_tensors=("*.weight 8x*", "*.norm"))
    assert policy.allows_tensor("encoder.0.bias", (4,))
    assert policy.allows_tensor("encoder.0.weight", (4, 8))
    assert not policy.allows_tensor("encoder.0.weight", (8, 4))
    assert not policy.allows_tensor("encoder.norm", (4,))
    assert not policy.allows_tensor("pooler.weight", (4, 8))
    assert EgressPolicy(deny_tensors=("*",)).allows_tensor("encoder.0.bias", (4,)) is False
    assert not EgressPolicy(allow_tensors=()).allows_tensor("encoder.0.bias", (4,))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"kinds": (Kind.DOMAIN_CARD, Kind.TASK_VECTOR)}, "kind catalog"),
        ({"kinds": (Kind.DOMAIN_CARD, Kind.CATALOG)}, "kind task-vector"),
        ({"codecs": (Codec.FP32, Codec.PARQUET, Codec.JSON)}, "codec bf16"),
        ({"codecs": (Codec.BF16, Codec.JSON)}, "codec parquet"),
        ({"max_payload_bytes": 103}, "104 bytes"),
        ({"max_run_bytes": 103}, "104 bytes"),
        ({"max_run_parcels": 2}, "3 parcels"),
        ({"deny_tensors": ("pooler.*",)}, "tensor pooler.weight [4, 4]"),
        ({"allow_tensors": ("encoder.*",)}, "tensor pooler.weight [4, 4]"),
    ],
)
def test_a_run_that_needs_more_is_refused(policy: dict[str, object], says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        EgressPolicy.model_validate(policy).check_run(RunConfig(), TENSORS)
    assert says in caught.value.message
    assert "policy.toml" in caught.value.next_step
    assert caught.value.code == "policy"
    assert isinstance(caught.value, GateError)


def test_a_run_that_needs_no_more_is_not() -> None:
    EgressPolicy(max_payload_bytes=104, max_run_bytes=104, max_run_parcels=3).check_run(RunConfig(), TENSORS)
    EgressPolicy(kinds=(Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR)).check_run(RunConfig(), TENSORS)


def home(path: Path, base: Path, **policy: object) -> Path:
    path.mkdir()
    config = ClientConfig(domain="tea", pseudonym="domain-1", server=ADDRESS, data="data", base=str(base))
    ClientHome.write_config(path, config)
    write_policy(path, EgressPolicy.model_validate(policy))
    return path


def explain(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["policy", "explain", str(path), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_explained_in_words(tmp_path: Path, pico_model: Path) -> None:
    said = explain(home(tmp_path / "home", pico_model, min_users=200, max_run_parcels=9))
    sizes = sum(4 * shape[0] * (shape[1:] or (1,))[0] for shape in trainable_tensors(pico_model).values())
    for words in (
        "policy.toml: valid",
        f"in fp32: {sizes:,} bytes",
        "ndcg@1, valid-answers; 200 users or more",
        "8,589,934,592 bytes in 9 parcels",
        "embedding tables",
        "differential privacy: not demanded, a vector may leave without it; no task vector has left",
        "anything else becomes the code `error`",
        "has no network" if isolation.possible() else "can reach the network",
    ):
        assert words in said
    assert "refused" not in said


def test_what_is_refused_is_explained(tmp_path: Path, pico_model: Path) -> None:
    path = home(
        tmp_path / "home", pico_model,
        kinds=["domain-card", "task-vector"], training_facts=["steps"], deny_tensors=["*.bias"],
        require_isolation=True, privacy={"max_epsilon": 4.0},
    )  # fmt: skip
    said = explain(path)
    assert "differential privacy: at most epsilon 4 for one vector, delta 1e-05, or no vector leaves" in said
    assert "not catalog: every run is refused" in said
    assert "metrics: none leave" in said
    assert "this domain refuses to train" in said
    found = json.loads(explain(path, "--format", "json"))
    assert found["vector"]["may_not_leave"]
    assert all(name.endswith(".bias") for name in found["vector"]["may_not_leave"])
    assert "catalog" in found["vector"]["codecs"]["bf16"]["refused"]
    assert found["policy"] == read_policy(path).model_dump(mode="json")
    assert found["isolation"] == {"required": True, "possible_here": isolation.possible()}


def test_a_demand_for_privacy_refuses_no_vector_of_a_private_run(tmp_path: Path, pico_model: Path) -> None:
    path = home(tmp_path / "home", pico_model, privacy={"max_total_epsilon": 10.0})
    found = json.loads(explain(path, "--format", "json"))
    assert found["privacy"]["demanded"]
    assert {codec["refused"] for codec in found["vector"]["codecs"].values()} == {""}


def test_a_home_without_a_policy_is_told_how_to_write_one(tmp_path: Path, pico_model: Path) -> None:
    path = home(tmp_path / "home", pico_model)
    (path / "policy.toml").unlink()
    done = CliRunner().invoke(app, ["policy", "explain", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "without a policy nothing leaves" in done.exception.message
    assert "isthmus client policy write" in done.exception.next_step
    assert CliRunner().invoke(app, ["policy", "write", str(path)]).exit_code == 0
    assert "valid" in explain(path)
