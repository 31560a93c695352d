"""What fine-tuning a published model takes, without its weights: memory, shards, time, bytes sent.

The architecture is built on torch's meta device from its configuration as JSON; memory and time are formulas
over its shapes, for the loop of `clients.training.language`: base weights frozen in bfloat16, A and B with
their gradients and Adam's two moments in float32, each block's activations computed again going backward.

Bytes a token that one block keeps for its backward pass (h hidden, q width of queries, f intermediate,
r rank; c bytes an activation, D 5 with dropout on A's input and 4 without):

    norms             2 * 4h             attention         4cq (keys and values are repeated to q)
    inputs of each A  D * input width    between A and B   4r for each adapted layer
    MLP               3cf

Frozen weights keep nothing; gradients inside a block take (c + 8) f at the worst moment. What autograd keeps
is counted in `tests/unit/simulations/test_language_plan.py`. Layers are cut between blocks, as a `device_map`
does; they work one after another, so that k GPUs hold more but are no faster than one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import LoraSection, RunConfig
from common.errors import ConfigError, suggest

ARCHITECTURES = Path(__file__).parent / "architectures"
GIB = 2**30
_ADAM_BYTES = 4 + 4 + 8  # of a trained parameter: itself, its gradient, two moments
_LOGIT_BYTES = (
    16  # of an answer token and a word: bf16 twice, float32 for the softmax, its result and gradient
)


@dataclass(frozen=True)
class Shapes:
    """Widths of one block; `inputs` are the summed input widths of its `adapted` layers."""

    hidden: int
    queries: int
    intermediate: int
    layers: int
    adapted: int
    inputs: int

    def block_bytes(self, lora: LoraSection, activation_bytes: int, mask_bytes: int = 1) -> int:
        """What one block keeps of a token going backward; a dropout mask is 1 byte on CUDA, 4 on CPU."""
        c = activation_bytes
        dropped = 4 + (mask_bytes if lora.dropout else 0)
        norms = 2 * 4 * self.hidden
        attention = c * 4 * self.queries
        return (
            norms
            + attention
            + dropped * self.inputs
            + 4 * lora.rank * self.adapted
            + 3 * c * self.intermediate
        )

    def gradient_bytes(self, activation_bytes: int) -> int:
        """Of a token, where the backward pass of a block holds most: behind `down_proj` and its A."""
        return (activation_bytes + 8) * self.intermediate


@dataclass(frozen=True)
class Batch:
    """The examples in memory at once, each of `tokens`, the last `answer_tokens` of them the answer."""

    examples: int
    tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Plan:
    """All figures; bytes are with a batch in memory, `shards` holds for each GPU its blocks and bytes."""

    architecture: str
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    weights_bytes: int
    optimiser_bytes: int
    kept_bytes: int
    block_bytes: int
    logits_bytes: int
    shards: list[tuple[int, int]]
    seconds: float

    def lines(self, *, fits: bool, gpu_memory_gib: float, most: int) -> list[str]:
        """For people."""
        rows = [
            ("parameters", f"{self.parameters:,}"),
            (
                "adapter",
                f"{self.adapter_parameters:,} numbers, {self.adapter_bytes / 1e6:.1f} MB on the wire",
            ),
            ("weights", _gib(self.weights_bytes)),
            ("A, B, Adam", _gib(self.optimiser_bytes)),
            ("kept activations", _gib(self.kept_bytes)),
            ("one block", _gib(self.block_bytes)),
            ("logits", _gib(self.logits_bytes)),
        ]
        rows += [
            (f"GPU {gpu}", f"{blocks} blocks, {_gib(size)}") for gpu, (blocks, size) in enumerate(self.shards)
        ]
        rows.append(("time", f"{self.seconds / 3600:.1f} hours"))
        rows.append(
            (
                "fits",
                f"{'yes' if fits else 'no'}, in {gpu_memory_gib:g} GiB each; at most {most} prompts at once",
            )
        )
        return [f"{self.architecture}", *(f"  {label:18}{text}" for label, text in rows)]


def read_architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of `base.model`: a folder with `config.json`, or one that comes with Isthmus.

    Raises ConfigError.
    """
    path = Path(name) / "config.json"
    known = {file.stem: file for file in sorted(ARCHITECTURES.glob("*.json"))}
    if not path.is_file():
        if name not in known:
            raise ConfigError(
                f"base.model {name!r} is neither a folder with config.json nor a known architecture",
                next_step=suggest(name, known),
            )
        path = known[name]
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict) or "model_type" not in loaded:
        raise ConfigError(f"{path}: not a model's configuration", next_step="obtain the file again")
    return Path(name).name, loaded


def build(architecture: dict[str, Any]) -> nn.Module:
    """The causal model on the meta device: shapes without numbers. Raises ConfigError."""
    settings = dict(architecture)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"transformers cannot build it: {err}", next_step="mend its config.json") from None
    return model


def shapes_of(model: nn.Module, lora: LoraSection) -> Shapes:
    """Raises ConfigError where `lora.modules` names what a block does not have."""
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = {
        name.rpartition(".")[2]: layer
        for name, layer in model.model.layers[0].named_modules()  # type: ignore[union-attr,index]
        if isinstance(layer, nn.Linear)
    }
    unknown = [module for module in lora.modules if module not in linear]
    if unknown:
        raise ConfigError(f"no layer is called {unknown[0]!r}", next_step=suggest(unknown[0], linear))
    return Shapes(
        hidden=config.hidden_size,
        queries=head * config.num_attention_heads,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        adapted=len(lora.modules),
        inputs=sum(linear[module].in_features for module in lora.modules),
    )


def adapter_parameters(model: nn.Module, lora: LoraSection) -> int:
    """Numbers in A and B of all adapted layers."""
    return sum(
        lora.rank * (layer.in_features + layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in lora.modules
    )


def make_plan(config: RunConfig, batch: Batch, gpus: int, tflops: float) -> Plan:
    """The plan of one domain's fine-tuning at `tflops` sustained on one GPU.

    It has `training.max_steps` steps of `training.batch_size` examples, in parts of `batch`.

    Raises ConfigError.
    """
    lora = config.lora or LoraSection()
    name, architecture = read_architecture(config.base.model)
    model = build(architecture)
    shapes = shapes_of(model, lora)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adapter = adapter_parameters(model, lora)
    tokens = batch.examples * batch.tokens
    block = (shapes.block_bytes(lora, 2) + shapes.gradient_bytes(2)) * tokens
    input_bytes = 2 * shapes.hidden if lora.gradient_checkpointing else shapes.block_bytes(lora, 2)
    kept = input_bytes * tokens * shapes.layers
    vocabulary = int(architecture["vocab_size"])
    logits = batch.examples * batch.answer_tokens * vocabulary * _LOGIT_BYTES
    block_parameters = sum(parameter.numel() for parameter in model.model.layers[0].parameters())  # type: ignore[union-attr,index]
    ends = (parameters - shapes.layers * block_parameters) * 2
    each = 2 * block_parameters + (_ADAM_BYTES * adapter + kept) // shapes.layers
    last = ends // 2 + max(0, logits - block)
    step = replace(batch, examples=config.training.batch_size)
    flops = _step_flops(shapes, block_parameters, vocabulary, step, lora)
    return Plan(
        architecture=name,
        parameters=parameters,
        adapter_parameters=adapter,
        adapter_bytes=adapter * (2 if config.training.vector_codec == "bf16" else 4),
        weights_bytes=2 * parameters,
        optimiser_bytes=_ADAM_BYTES * adapter,
        kept_bytes=kept,
        block_bytes=block,
        logits_bytes=logits,
        shards=_shards(shapes.layers, each, (ends - ends // 2, last), block, gpus),
        seconds=config.training.max_steps * flops / tflops / 1e12,
    )


def most_at_once(config: RunConfig, tokens: int, answer_tokens: int, gpus: int, memory_bytes: float) -> int:
    """The most examples at once that fit; 0 where not even one does. Memory is linear in them."""
    one, two = (
        max(size for _, size in make_plan(config, Batch(n, tokens, answer_tokens), gpus, 1.0).shards)
        for n in (1, 2)
    )
    return max(0, int((memory_bytes - one) // max(1, two - one)) + 1)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


def _shards(layers: int, each: int, ends: tuple[int, int], working: int, gpus: int) -> list[tuple[int, int]]:
    """Contiguous blocks on `gpus` GPUs with the least largest share: (blocks, bytes) of each.

    The input embeddings are on the first, the output matrix and the logits on the last; every GPU needs the
    working memory of a block.
    """

    def fixed(gpu: int) -> int:
        return working + (ends[0] if gpu == 0 else 0) + (ends[1] if gpu == gpus - 1 else 0)

    counts = [0] * gpus
    for _ in range(layers):
        gpu = min(range(gpus), key=lambda g: (fixed(g) + (counts[g] + 1) * each, g))
        counts[gpu] += 1
    return [(count, fixed(gpu) + count * each) for gpu, count in enumerate(counts)]


def _step_flops(
    shapes: Shapes, block_parameters: int, vocabulary: int, batch: Batch, lora: LoraSection
) -> float:
    """Two a parameter and token forward, two for the gradient of activations, two more where recomputed.

    Attention is causal: on average half of the positions. The output matrix sees answers only, once each way.
    """
    tokens = batch.examples * batch.tokens
    passes = 3 if lora.gradient_checkpointing else 2
    blocks = 2 * block_parameters * passes * tokens * shapes.layers
    attention = 2 * shapes.queries * batch.tokens * (passes + 1) * tokens * shapes.layers
    return float(blocks + attention + 4 * vocabulary * shapes.hidden * batch.examples * batch.answer_tokens)
