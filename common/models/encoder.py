"""The encoder: text of items and histories in, unit-norm embeddings out.

Text (METHODS, MergeRec sec. 2): an item is its `"key: value"` attributes, each cut to a number of
tokens, joined by `", "`; a history is its items, most recent first, joined by `"; "`, cut to
`max_seq_len` tokens. Items are tokenised once and histories put together from the pieces; the ids are
identical to those of the joined text, so a published model gives the same embedding from plain text
(`ItemTokens.history_text`) in any library.

    encoder = Encoder.load(resolve_base("embedded"))
    tokens = encoder.tokenize_items([["title: Red lipstick", "brand: Acme"]], max_attribute_tokens=32)
    z_IE = encoder.encode(tokens.items())           # every item
    z_UE = encoder.encode([tokens.history([0], 64)])  # one user
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from common.errors import DataError, ModelError
from common.models.base import Pooling, load_tensors, max_tokens, read_entries, read_pooling
from common.models.packed import NAME as PACKED
from common.models.packed import Packing, can_pack
from common.models.weights import FLOAT_DTYPES

Precision = Literal["auto", "fp32", "bf16"]
ATTRIBUTE_SEPARATOR = ", "
ITEM_SEPARATOR = "; "
_PROBES = 32
_DROPOUT_KEYS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout",
    "embedding_dropout", "mlp_dropout",
)  # fmt: skip


class ItemTokens:
    """A catalog tokenised once. Item indices are positions in the catalog.

    `texts` are the items' texts after cutting attributes. Ids with special tokens come out of
    `item`, `items` and `history`. Tokenisation is split only before a space, where the tokenizers of
    BERT, RoBERTa and SentencePiece kind split too; that is probed on the catalog itself, and where it
    fails histories are tokenised from the joined text, which is slower and equally exact.
    """

    def __init__(self, tokenizer: Any, texts: list[str], limit: int) -> None:
        self.texts = texts
        self._tokenizer = tokenizer
        self._limit = limit
        self._prefix, self._suffix = _special_ids(tokenizer)
        self._pieces: dict[tuple[bool, bool], list[list[int]]] = {}
        self._splits = self._check_split()

    def __len__(self) -> int:
        return len(self.texts)

    def item(self, index: int, max_seq_len: int | None = None) -> list[int]:
        """Ids of one item; the same as its one-item history. None cuts at the model's own limit."""
        return self._wrap(self._piece(index, first=True, last=True), max_seq_len)

    def items(self, max_seq_len: int | None = None) -> list[list[int]]:
        """Ids of every item, in catalog order."""
        return [self.item(index, max_seq_len) for index in range(len(self))]

    def history(self, item_indices: Sequence[int], max_seq_len: int | None = None) -> list[int]:
        """Ids of a history given **most recent first**; special tokens count towards `max_seq_len`."""
        if not self._splits:
            return self._wrap(_ids(self._tokenizer, [self.history_text(item_indices)])[0], max_seq_len)
        room = self._room(max_seq_len)
        ids: list[int] = []
        for position, index in enumerate(item_indices):
            ids += self._piece(int(index), first=position == 0, last=position == len(item_indices) - 1)
            if len(ids) >= room:
                break
        return self._wrap(ids, max_seq_len)

    def history_text(self, item_indices: Sequence[int]) -> str:
        """The text that `history` stands for (uncut)."""
        return ITEM_SEPARATOR.join(self.texts[int(index)] for index in item_indices)

    def _wrap(self, ids: list[int], max_seq_len: int | None) -> list[int]:
        return [*self._prefix, *ids[: self._room(max_seq_len)], *self._suffix]

    def _room(self, max_seq_len: int | None) -> int:
        limit = self._limit if max_seq_len is None else min(max_seq_len, self._limit)
        return max(limit - len(self._prefix) - len(self._suffix), 1)

    def _piece(self, index: int, *, first: bool, last: bool) -> list[int]:
        """An item's ids with the separator's halves that belong to it: a space before, ";" after."""
        key = (first, last)
        if key not in self._pieces:
            before, after = "" if first else " ", "" if last else ITEM_SEPARATOR.rstrip()
            self._pieces[key] = _ids(self._tokenizer, [before + text + after for text in self.texts])
        return self._pieces[key][index]

    def _check_split(self) -> bool:
        """Whether putting pieces together gives the joined text's ids, on pairs from all over the catalog."""
        count = len(self.texts)
        step = max(count // _PROBES, 1)
        pairs = [(self.texts[i], self.texts[(i * 7 + 1) % count]) for i in range(0, count, step)]
        mark, space = ITEM_SEPARATOR.rstrip(), " "
        whole = _ids(self._tokenizer, [left + ITEM_SEPARATOR + right for left, right in pairs])
        lefts = _ids(self._tokenizer, [left + mark for left, _ in pairs])
        rights = _ids(self._tokenizer, [space + right for _, right in pairs])
        return all(left + right == ids for ids, left, right in zip(whole, lefts, rights, strict=True))


class Encoder:
    """A transformer with its tokenizer and pooling. `model`'s parameter names are the file's.

    The pooler layer, if the file has one, is left out: neither mean nor cls pooling uses it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, pooling: Pooling, *, bf16: bool, limit: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.bf16 = bf16
        self.max_tokens = limit
        self.dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @classmethod
    def load(
        cls,
        folder: Path,
        pooling: Pooling | Literal["auto"] = "auto",
        device: str = "cpu",
        precision: Precision = "fp32",
        dropout: float | None = None,
        *,
        for_training: bool = False,
        packed: bool = False,
    ) -> Encoder:
        """Load a model folder, in evaluation mode. `dropout` None keeps the model's own (training only).

        `for_training` takes plain attention on the CPU, whose backward pass is the faster one there.
        `packed` leaves padding out of the computation where the model can (`packed.can_pack`).
        `precision` "auto" computes in bfloat16 where the hardware has it; weights stay float32.
        Raises ModelError where the folder is incomplete or its tensors are not the architecture's.
        """
        tensors = {
            entry.name
            for entry in read_entries(folder)
            if entry.dtype in FLOAT_DTYPES and "pooler." not in entry.name
        }
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            for key in _DROPOUT_KEYS if dropout is not None else ():
                if hasattr(config, key):
                    setattr(config, key, dropout)
            attention = {"attn_implementation": "eager"} if for_training and device == "cpu" else {}
            if packed and can_pack(config, device):
                attention = {"attn_implementation": PACKED}
            model = AutoModel.from_config(config, dtype=torch.float32, **attention)
        except (OSError, ValueError, KeyError, TypeError) as err:
            reason = str(err).splitlines()[0] if str(err) else type(err).__name__
            raise ModelError(
                f"{folder}: transformers cannot load it: {reason}", next_step="check the model folder"
            ) from err
        if hasattr(model, "pooler"):
            model.pooler = None
        wanted = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        if wanted != tensors:
            name = min(wanted ^ tensors)
            where = "is missing from the file" if name in wanted else "is not part of the architecture"
            raise ModelError(
                f"{folder}: tensor {name!r} {where}",
                next_step="load it with AutoModel.from_pretrained and save it again with save_pretrained",
            )
        if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
            raise ModelError(
                f"{folder}: needs a fast tokenizer with a padding token", next_step="add tokenizer.json"
            )
        model.load_state_dict(load_tensors(folder, wanted), strict=False)
        model.to(device).eval()
        limit = min(max_tokens(config.to_dict()), int(tokenizer.model_max_length))
        chosen = read_pooling(folder) if pooling == "auto" else pooling
        return cls(model, tokenizer, chosen, bf16=use_bf16(precision, device), limit=limit)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def is_packed(self) -> bool:
        """Whether padding is left out of the computation. Layers then see one row of tokens."""
        return bool(self.model.config._attn_implementation == PACKED)  # type: ignore[union-attr]

    def tokenize_items(self, texts: list[list[str]], max_attribute_tokens: int) -> ItemTokens:
        """Tokenise a catalog: for each item its `"key: value"` strings (`Catalog.texts`).

        White space is collapsed; each string is cut, at the end of a token, to `max_attribute_tokens`.
        Raises DataError naming the position of an item without text.
        """
        unique = list(dict.fromkeys(" ".join(text.split()) for strings in texts for text in strings))
        cut = dict(zip(unique, self._cut(unique, max_attribute_tokens), strict=True))
        joined = []
        for index, strings in enumerate(texts):
            parts = [cut[" ".join(text.split())] for text in strings]
            joined.append(ATTRIBUTE_SEPARATOR.join(part for part in parts if part))
            if not joined[-1]:
                raise DataError(f"item {index} of the catalog has no text", next_step="give it an attribute")
        if not joined:
            raise DataError("the catalog has no items", next_step="check the data")
        return ItemTokens(self.tokenizer, joined, self.max_tokens)

    def _cut(self, strings: list[str], max_attribute_tokens: int) -> list[str]:
        if not strings:
            return []
        encoded = self.tokenizer(
            strings,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            text[: offsets[max_attribute_tokens - 1][1]] if len(offsets) > max_attribute_tokens else text
            for text, offsets in zip(strings, encoded["offset_mapping"], strict=True)
        ]

    def batch(self, list_of_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """`(input_ids_BT, mask_BT)` on the model's device, int64, padded on the right to the longest."""
        longest = max(len(ids) for ids in list_of_ids)
        pad = int(self.tokenizer.pad_token_id)
        input_ids_BT = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in list_of_ids])
        lengths_B = torch.tensor([len(ids) for ids in list_of_ids])
        mask_BT = (torch.arange(longest)[None, :] < lengths_B[:, None]).to(torch.int64)
        return input_ids_BT.to(self.device), mask_BT.to(self.device)

    def forward(
        self, input_ids_BT: Tensor, mask_BT: Tensor, params: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Unit-norm float32 embeddings `z_BE`.

        With `params` the model runs with these tensors in the place of its own of the same name
        (`torch.func.functional_call`), so that gradients reach whatever they were computed from.
        """
        packing = Packing(mask_BT) if self.is_packed else None
        if packing:
            inputs = packing.inputs(input_ids_BT, self.model.config)
        else:
            inputs = {"input_ids": input_ids_BT, "attention_mask": mask_BT}
        with self._autocast():
            if params is None:
                output = self.model(**inputs)
            else:
                output = torch.func.functional_call(self.model, dict(params), args=(), kwargs=inputs)
        hidden_BTE = output.last_hidden_state.float()
        if packing:
            hidden_BTE = packing.pad(hidden_BTE[0])
        if self.pooling == "cls":
            pooled_BE = hidden_BTE[:, 0]
        else:
            weight_BT1 = mask_BT[:, :, None].float()
            pooled_BE = (hidden_BTE * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1.0)
        return nn.functional.normalize(pooled_BE, dim=-1)

    @torch.no_grad()
    def encode(
        self,
        list_of_ids: Sequence[Sequence[int]],
        batch_size: int = 128,
        params: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings `z_NE` (float32, on the model's device) in the order given, without dropout.

        Batches are made of neighbours in length, so that little is spent on padding.
        """
        z_NE = torch.empty(len(list_of_ids), self.dim, device=self.device)
        order = sorted(range(len(list_of_ids)), key=lambda index: -len(list_of_ids[index]))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                ids_BT, mask_BT = self.batch([list_of_ids[index] for index in chosen])
                z_NE[chosen] = self.forward(ids_BT, mask_BT, params)
        finally:
            self.model.train(was_training)
        return z_NE

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def use_bf16(precision: Precision, device: str) -> bool:
    """Whether to compute in bfloat16. "auto" asks the hardware: CUDA's own answer, or the CPU's flags."""
    if precision != "auto":
        return precision == "bf16"
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens and without truncation."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ModelError(
        "the tokenizer changes a text when it adds special tokens", next_step="use another model"
    )
