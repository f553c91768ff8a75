"""Layers run one at a time against the whole stock model, and routing against its formula."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeDecoderLayer

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import EXPERT_MATRICES
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.registry import architecture_of

CPU = torch.device("cpu")


def test_layer_by_layer_equals_the_stock_model(micro_ernie: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(
        micro_ernie, dtype=torch.float32, experts_implementation="eager"
    )
    ids = torch.randint(0, 128, (1, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(ids, output_hidden_states=True).hidden_states

    source = open_checkpoint(micro_ernie)
    model = architecture_of(source.config)
    sizes = model.sizes
    assert sizes.moe_layers == (1, 2)
    hidden = source.tensor("model.embed_tokens.weight").float()[ids]
    for index in range(sizes.layers):
        torch.testing.assert_close(hidden, expected[index], rtol=1e-4, atol=1e-4)
        layer = model.load_layer(source, index, CPU)
        hidden = model.attend(layer, hidden)
        if index not in sizes.moe_layers:
            hidden = model.dense_mlp(layer, hidden)
            continue
        hidden, inputs = model.route(layer, hidden)
        for expert in range(sizes.experts):
            gate, up, down = (
                source.tensor(model.expert_matrix_name(index, expert, m)).float()
                for m in EXPERT_MATRICES
            )
            token, slot = torch.where(inputs.expert == expert)
            x = inputs.x[token]
            output = linear(silu(linear(x, gate)) * linear(x, up), down)
            hidden[0].index_add_(0, token, output * inputs.weight[token, slot][:, None])


def router_layer(norm_min: float) -> tuple[Ernie45Moe, Ernie4_5_MoeDecoderLayer]:
    config = Ernie4_5_MoeConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, moe_num_experts=6, moe_k=3, moe_intermediate_size=8,
        moe_num_shared_experts=0, moe_layer_start_index=0, moe_norm_min=norm_min, vocab_size=16,
    )  # fmt: skip
    model = Ernie45Moe(config.to_dict())
    return model, Ernie4_5_MoeDecoderLayer(model.config, 0)


@pytest.mark.parametrize("norm_min", [1e-12, 0.9])
def test_routing_formula(norm_min: float) -> None:
    torch.manual_seed(1)
    model, layer = router_layer(norm_min)
    # Experts 1 and 4 are the same, so every token has a tie; the bias changes the selection.
    weight = torch.randn(6, 8)
    weight[4] = weight[1]
    layer.mlp.gate.weight.data = weight
    bias = torch.tensor([0.3, 0.0, -0.2, 0.1, 0.0, 0.05])
    layer.mlp.gate.moe_statics.e_score_correction_bias.data = bias[None]
    hidden = torch.randn(1, 50, 8)
    with torch.no_grad():
        after, inputs = model.route(layer, hidden)
        x = layer.post_attention_layernorm(hidden)[0]
    assert torch.equal(after, hidden)
    assert torch.equal(inputs.x, x)
    probability = torch.softmax(x @ weight.T, dim=-1)
    chosen = (probability + bias).topk(3).indices
    assert torch.equal(inputs.expert, chosen)
    # Without the bias other experts would be chosen, and the weights do not contain it.
    assert not torch.equal(chosen, probability.topk(3).indices)
    picked = probability.gather(1, chosen)
    expected = picked / picked.sum(-1, keepdim=True).clamp_min(norm_min)
    torch.testing.assert_close(inputs.weight, expected)
    if norm_min == 0.9:
        assert (inputs.weight.sum(-1) < 0.999).any()


def test_layers_with_experts_follow_interval_and_range() -> None:
    config = Ernie4_5_MoeConfig(
        num_hidden_layers=9, moe_layer_interval=2, moe_layer_start_index=2, moe_layer_end_index=6
    )
    assert Ernie45Moe(config.to_dict()).sizes.moe_layers == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'; supported: ernie4_5_moe"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"hidden_act": "geluu"}, "hidden_act 'geluu'; unknown"),
        ({"moe_layer_interval": 0}, "moe_layer_interval 0; expected a positive integer"),
        ({"hidden_size": "big"}, "not a valid ernie4_5_moe config"),
        ({"moe_layer_start_index": 5, "moe_layer_end_index": 4}, "no layer with experts"),
    ],
)
def test_other_configs_are_refused(
    micro_ernie: Path, change: dict[str, object], message: str
) -> None:
    settings = json.loads((micro_ernie / "config.json").read_text()) | change
    with pytest.raises(ErnieQuantError, match=message):
        architecture_of(settings)


def test_a_missing_tensor_is_named_and_only_the_bias_may_be(micro_ernie: Path) -> None:
    source = open_checkpoint(micro_ernie)
    model = architecture_of(source.config)

    class Without:
        def __init__(self, missing: str):
            self.missing = missing

        def names(self) -> list[str]:
            return [name for name in source.names() if name != self.missing]

        def tensor(self, name: str) -> torch.Tensor:
            if name == self.missing:
                raise ErnieQuantError(f"tensor {name} is missing")
            return source.tensor(name)

    name = "model.layers.1.post_attention_layernorm.weight"
    with pytest.raises(ErnieQuantError, match=f"{name} is missing"):
        model.load_layer(Without(name), 1, CPU)
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    layer = model.load_layer(Without(bias), 1, CPU)
    assert not layer.mlp.gate.moe_statics.e_score_correction_bias.any()
