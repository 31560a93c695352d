"""A tokenizer from a vocabulary with scores: the list that small Llama models come with.

The file is JSON: `tokens` (strings; each character stands for one byte) and `scores` (the higher, the
earlier a merge). It is SentencePiece's BPE: a space is put before the text, characters that no token has
fall back to byte tokens `<0x00>` to `<0xFF>`, then the pair whose join has the highest score is joined
until none is left. Ids 0, 1 and 2 are the unknown token, the beginning and the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import ModelError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_UNKNOWN, _BEGIN, _END = _SPECIAL = ("<unk>", "<s>", "</s>")


def find_vocabulary(folder: Path) -> Path | None:
    """The one vocabulary-and-score list of a model folder (`*vocab*.json` with both keys), or None."""
    for path in sorted(folder.glob("*vocab*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and set(data) == {"tokens", "scores"}:
            return path
    return None


def load_vocabulary(path: Path) -> Any:
    """A `PreTrainedTokenizerFast` of the list. Raises ModelError where it is not of that form."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    data = json.loads(path.read_text(encoding="utf-8"))
    tokens, scores = data["tokens"], data["scores"]
    for name, values, kind in (("tokens", tokens, str), ("scores", scores, (int, float))):
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ModelError(f"{path}: {name!r} is no list of its kind", next_step="obtain the model again")
    if len(tokens) != len(scores):
        raise ModelError(f"{path}: tokens and scores differ in number", next_step="obtain the model again")
    pieces = list(_SPECIAL) + [_piece(token) for token in tokens[3:]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ModelError(f"{path}: a token occurs twice", next_step="obtain the model again")
    missing = [code for code in range(256) if f"<0x{code:02X}>" not in vocabulary]
    if missing:
        raise ModelError(
            f"{path}: byte token <0x{missing[0]:02X}> is missing", next_step="use a list with byte fallback"
        )
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces, scores, vocabulary), unk_token=_UNKNOWN,
        byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=_UNKNOWN, bos_token=_BEGIN, eos_token=_END
    )


def _piece(token: str) -> str:
    """The token's text, with a visible space; a token that is no whole text (one byte of many) stays."""
    try:
        text = token.encode("latin-1").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        text = token
    return text.replace(" ", SPACE)


def _merges(pieces: list[str], scores: list[float], known: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the highest score first."""
    found: list[tuple[float, tuple[str, str]]] = []
    for piece, score in zip(pieces, scores, strict=True):
        if piece in _SPECIAL or (piece.startswith("<0x") and len(piece) == 6):
            continue
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        found += [(score, cut) for cut in cuts if cut[0] in known and cut[1] in known]
    return [cut for _, cut in sorted(found, key=lambda entry: -entry[0])]
