"""A causal language model from a folder in Hugging Face layout, and LoRA layers put into it.

Rules: nothing is fetched and no code of the folder runs; weights are safetensors, never pickle; an
adapter's tensors are copied into the layers in place, so that the next adapter costs a copy and no
rebuild; texts are texts: a catalog title that spells a special token does not become one.

    lm = load_causal(Path("base"))
    lm.attach(LoraSection(rank=8), adapter)
    lm.set_adapter(other)   # same rank and modules
    lm.detach()             # the base again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from common.config import LoraSection
from common.errors import ModelError
from common.language.adapters import Adapter, check_adapter
from common.language.layers import put_lora
from common.language.vocabulary import find_vocabulary, load_vocabulary
from common.models.encoder import Precision, use_bf16

_NAME = "default"


class CausalLM:
    """`model` and `tokenizer`, in evaluation mode.

    `eos_ids` end an answer, the tokenizer's own first. `max_tokens` is how many positions there are, or how
    many a sliding window holds: within it, such a layer is like any other.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._peft: Any = None
        limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
        self.max_tokens = min((int(limit) for limit in limits if limit), default=1 << 30)
        self.eos_ids = _eos_ids(model, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        where: torch.device = next(self.model.parameters()).device
        return where

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the tokenizer puts first (and never an end)."""
        ids = self._ids([text], special=True)[0]
        while len(ids) > 1 and ids[-1] in self.eos_ids:
            ids.pop()
        return ids

    def encode_answers(self, prompt: str, answers: Sequence[str], *, end: bool = True) -> list[list[int]]:
        """Ids of each answer as it goes on from `encode(prompt)`; `end` adds the end-of-text token.

        Answers are tokenised behind the prompt's last line, so that they get the tokens that they have
        in the whole text (a word at the start of a text is another token than after a line break). Where
        a tokenizer joins across the border, the answer is tokenised on its own.
        """
        border = prompt[prompt.rstrip("\n").rfind("\n") + 1 :]
        lead, *joined = self._ids([border, *(border + answer for answer in answers)], special=False)
        ids = [whole[len(lead) :] if whole[: len(lead)] == lead else None for whole in joined]
        tail = [self.eos_ids[0]] if end and self.eos_ids else []
        alone = self._ids(list(answers), special=False) if None in ids else [[] for _ in answers]
        return [(own if found is None else found) + tail for found, own in zip(ids, alone, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def attach(self, lora: LoraSection, adapter: Adapter | None = None) -> None:
        """Put LoRA layers in: `adapter`'s tensors, or fresh ones (A random, B zero: the base's own output).

        What was attached before goes first. Raises ModelError where no layer has the modules' names.
        """
        self.detach()
        try:
            self._peft = put_lora(self.model, lora, "CAUSAL_LM")
        except ValueError as err:
            raise ModelError(
                f"LoRA does not fit this model: {str(err).splitlines()[0]}",
                next_step="name modules that the model has, e.g. q_proj and v_proj",
            ) from None
        self._peft.eval()
        if adapter is not None:
            self.set_adapter(adapter)

    def set_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """Copy the tensors into the attached layers, in place. Raises VectorError naming a misfit."""
        parameters = self.lora_parameters()
        check_adapter(adapter, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The attached A and B by the names under which peft saves them. Raises ModelError without any."""
        if self._peft is None:
            raise ModelError("no LoRA layers are attached", next_step="call attach first")
        return {
            name.replace(f".{_NAME}.", "."): parameter
            for name, parameter in self._peft.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }

    def adapter(self) -> Adapter:
        """A copy of the attached tensors, on the CPU in float32."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.lora_parameters().items()
        }

    def detach(self) -> None:
        """Take the LoRA layers out again; the base's weights were never touched."""
        if self._peft is not None:
            self.model = self._peft.unload()
            self._peft = None

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, split_special_tokens=True,
            verbose=False,
        )  # fmt: skip
        return [list(ids) for ids in encoded["input_ids"]]


def load_causal(folder: Path, *, precision: Precision = "auto", device: str = "cpu") -> CausalLM:
    """Load a model folder. "auto" keeps weights in bfloat16 where the hardware computes in it.

    The tokenizer is the folder's own, or made from a vocabulary-and-score list. Raises ModelError.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json", next_step="give a folder that save_pretrained wrote")
    dtype = torch.bfloat16 if use_bf16(precision, device) else torch.float32
    listed = None if (folder / "tokenizer.json").is_file() else find_vocabulary(folder)
    try:
        tokenizer = load_vocabulary(listed) if listed is not None else _own_tokenizer(folder)
        with _without_bars():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise ModelError(
            f"{folder}: transformers cannot load it: {reason}", next_step="check the model folder"
        ) from err
    for what, names in (("is missing from the file", "missing_keys"), ("has no place", "unexpected_keys")):
        if loading[names]:
            raise ModelError(
                f"{folder}: tensor {min(loading[names])!r} {what}",
                next_step="load it with AutoModelForCausalLM and save it again with save_pretrained",
            )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: needs a fast tokenizer", next_step="add tokenizer.json")
    rows = int(model.get_input_embeddings().num_embeddings)
    if len(tokenizer) > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {rows}",
            next_step="use the tokenizer that the model was trained with",
        )
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(
            f"{folder}: layers of kind {min(kinds)!r} keep no keys and values to share among candidates",
            next_step="use a model of attention layers, such as Qwen2 or Llama",
        )
    model.requires_grad_(False)
    return CausalLM(model.to(device).eval(), tokenizer)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers' own, which it draws without a terminal, too."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _own_tokenizer(folder: Path) -> Any:
    """`tokenizer.json` as it is: the architecture's class may add tokens of its own to the vocabulary."""
    known = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    return known.from_pretrained(folder, local_files_only=True)


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token first, then others that the model's settings name."""
    found = [tokenizer.eos_token_id]
    for settings in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(settings, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
