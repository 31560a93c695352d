"""A cosigner follows logs that grow, and no other."""

from pathlib import Path

import pytest

from common.cosigning import Cosigner, StaleError
from common.errors import LedgerError, ProofError, SignatureError
from common.merkle import Tree, leaf_hash
from common.notes import Checkpoint, Note, Signer, Verifier
from common.signing import SigningKey

LOG = Signer("isthmus/toys/1", SigningKey(b"l" * 32))
OWN = Signer("witness.example", SigningKey(b"w" * 32))
LOG_KEY, OWN_KEY = Verifier(LOG.name, LOG.key.public), Verifier(OWN.name, OWN.key.public)


def _tree(size: int, salt: bytes = b"") -> Tree:
    tree = Tree()
    for index in range(size):
        tree.append(leaf_hash(salt + bytes([index])))
    return tree


def _note(tree: Tree, signer: Signer = LOG) -> str:
    return str(signer.sign(Checkpoint(signer.name, len(tree), tree.root()).text()))


@pytest.fixture
def cosigner(tmp_path: Path) -> Cosigner:
    return Cosigner(tmp_path, OWN, clock=lambda: 1700000000.5)


def test_a_log_that_grows_is_cosigned(cosigner: Cosigner, tmp_path: Path) -> None:
    assert cosigner.latest("toys", LOG_KEY).size == 0
    first = cosigner.cosign("toys", [LOG_KEY], _note(_tree(3)), 0, [])
    assert first.cosigned_by(OWN_KEY) == 1700000000
    again = Cosigner(tmp_path, OWN)
    assert again.latest("toys", LOG_KEY).size == 3
    grown = _tree(8)
    again.cosign("toys", [LOG_KEY], _note(grown), 3, grown.consistency(3))
    again.cosign("toys", [LOG_KEY], _note(grown), 8, [])  # the same once more, with a new date
    assert again.latest("toys", LOG_KEY) == Checkpoint(LOG.name, 8, grown.root())


def test_another_history_is_not(cosigner: Cosigner) -> None:
    cosigner.cosign("toys", [LOG_KEY], _note(_tree(3)), 0, [])
    other = _tree(8, b"other")
    with pytest.raises(ProofError):
        cosigner.cosign("toys", [LOG_KEY], _note(other), 3, other.consistency(3))
    with pytest.raises(ProofError):
        cosigner.cosign("toys", [LOG_KEY], _note(_tree(3, b"other")), 3, [])
    for old_size in (0, 2, 8):
        with pytest.raises(StaleError) as caught:
            cosigner.cosign("toys", [LOG_KEY], _note(other), old_size, other.consistency(old_size))
        assert caught.value.known_size == 3
    with pytest.raises(StaleError):
        cosigner.cosign("toys", [LOG_KEY], _note(_tree(2)), 3, [])
    assert cosigner.latest("toys", LOG_KEY).root == _tree(3).root()


def test_only_the_logs_own_key_counts(cosigner: Cosigner) -> None:
    stranger = Signer(LOG.name, SigningKey(b"s" * 32))
    with pytest.raises(SignatureError):
        cosigner.cosign("toys", [LOG_KEY], _note(_tree(3), stranger), 0, [])
    with pytest.raises(SignatureError):
        cosigner.cosign("toys", [LOG_KEY], _note(_tree(3), OWN), 0, [])
    assert cosigner.latest("toys", LOG_KEY).size == 0


def test_lines_of_others_are_not_kept(cosigner: Cosigner) -> None:
    crowded = Note.parse(_note(_tree(3)))
    for number in range(15):
        crowded = crowded.with_cosignature(Signer(f"w{number}", SigningKey(b"x" * 32)), time_s=1)
    assert len(cosigner.cosign("toys", [LOG_KEY], str(crowded), 0, []).signatures) == 2


def test_what_was_kept_is_not_forgotten_quietly(cosigner: Cosigner, tmp_path: Path) -> None:
    cosigner.cosign("toys", [LOG_KEY], _note(_tree(3)), 0, [])
    for damaged in (b"", b"\xff", _note(_tree(3)).encode()):  # the last: never cosigned here
        (tmp_path / "toys").write_bytes(damaged)
        with pytest.raises(LedgerError, match="toys"):
            cosigner.cosign("toys", [LOG_KEY], _note(_tree(8)), 0, [])
