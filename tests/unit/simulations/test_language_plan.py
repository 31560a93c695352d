"""Plans of published models: their published size, the adapter's table, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from common.cli import cli
from common.config import BaseSection, LoraSection, RunConfig, load_toml
from common.errors import ConfigError
from common.language.adapters import adapter_tensors
from simulations.language.plan import (
    GIB,
    Batch,
    adapter_parameters,
    build,
    make_plan,
    most_at_once,
    read_architecture,
    shapes_of,
)

CONFIGS = Path(__file__).resolve().parents[3] / "simulations" / "configs"
SMALL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOLERANCE = 0.1


@pytest.mark.parametrize(
    ("file", "parameters", "adapter"),
    [("qwen2-7b", 7_615_616_512, 40_370_176), ("llama-3.1-8b", 8_030_261_248, 41_943_040)],
)
def test_configuration_has_the_published_size(file: str, parameters: int, adapter: int) -> None:
    config = load_toml(CONFIGS / f"{file}.toml", RunConfig)
    plan = make_plan(config, Batch(8, 1024, 64), gpus=4, tflops=300.0)
    assert config.lora == LoraSection(rank=16, alpha=32.0, dropout=0.05)
    assert (plan.parameters, plan.adapter_parameters) == (parameters, adapter)
    assert plan.weights_bytes == 2 * parameters and plan.adapter_bytes == 2 * adapter
    assert (
        sum(blocks for blocks, _ in plan.shards) == build(read_architecture(file)[1]).config.num_hidden_layers
    )
    sizes = [size for _, size in plan.shards]
    alone = make_plan(config, Batch(8, 1024, 64), gpus=1, tflops=300.0)
    assert max(sizes) < alone.shards[0][1] < sum(sizes)


def test_largest_batch_fits_and_one_more_does_not() -> None:
    config = load_toml(CONFIGS / "qwen2-7b.toml", RunConfig)
    most = most_at_once(config, 1024, 64, gpus=1, memory_bytes=80 * GIB)
    fitting, above = (
        make_plan(config, Batch(size, 1024, 64), 1, 1.0).shards[0][1] for size in (most, most + 1)
    )
    assert fitting <= 80 * GIB < above


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_block_bytes_are_what_autograd_keeps(dropout: float) -> None:
    """The second block of a bfloat16 model with LoRA in float32, under a mask as padded batches have it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    lora = LoraSection(rank=4, dropout=dropout)
    settings = {key: value for key, value in SMALL.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings), dtype=torch.bfloat16)
    expected = shapes_of(model, lora).block_bytes(lora, 2, mask_bytes=4)
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules=list(lora.modules), task_type="CAUSAL_LM")
    )
    block, kept = model.model.layers[1], {}
    own = {parameter.untyped_storage().data_ptr() for parameter in peft.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    examples, tokens = 2, 96
    hidden = torch.randn(examples, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(examples, 1, -1, -1)
    own.add(mask.untyped_storage().data_ptr())
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    own.update(part.untyped_storage().data_ptr() for part in rotary)
    peft.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = block(hidden, position_embeddings=rotary, attention_mask=mask)
    assert output.requires_grad
    found = sum(size for size, _ in kept.values()) / (examples * tokens)
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_adapter_parameters_are_those_of_the_table(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in SMALL.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path)
    lora = LoraSection(rank=4)
    table = adapter_tensors(tmp_path, lora)
    assert adapter_parameters(build(SMALL), lora) == sum(rows * columns for rows, columns in table.values())
    name, architecture = read_architecture(str(tmp_path))
    assert name == tmp_path.name and architecture["model_type"] == "llama"


def test_unknown_architecture_and_module_are_named() -> None:
    config = RunConfig(base=BaseSection(model="qwen2-7"))
    with pytest.raises(ConfigError, match="did you mean 'qwen2-7b'"):
        make_plan(config, Batch(1, 64, 8), 1, 1.0)
    with pytest.raises(ConfigError, match="q_projection"):
        shapes_of(build(SMALL), LoraSection(modules=("q_projection",)))


def test_command_says_whether_it_fits() -> None:
    arguments = ["language", "plan", str(CONFIGS / "qwen2-7b.toml")]
    runner = CliRunner()
    refused = runner.invoke(cli, [*arguments, "--gpu-memory-gib", "16"])
    assert refused.exit_code == 1 and "no, in 16 GiB each" in refused.output
    fitting = runner.invoke(cli, [*arguments, "--gpus", "4"])
    assert fitting.exit_code == 0 and "GPU 3             6 blocks" in fitting.output
