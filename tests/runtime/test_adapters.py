"""LoRA on packed models, as people write it: any list of targets, a trainer, saving, merging."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.runtime.decoding_module import DecodingExperts
from tests.runtime.families import from_pretrained, inputs

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, Any] = {
    "named": [*ATTENTION, *MLP],
    "all-linear": "all-linear",
    "regex": r".*\.(q_proj|down_proj)",
    # Layer 2 of the dense model is not packed, nor are the shared experts and the first layer of
    # the others.
    "only of MLPs": MLP,
}


def lora(targets: Any, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM", **options)


def adapted(model: Any) -> set[str]:
    """Paths of modules that have an adapter, as in the plain model."""
    marks = (n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A"))
    return {name.removeprefix("base_model.model.") for name in marks}


def linear_outside_experts(exported: Path, packed: Path) -> set[str]:
    """Linear modules of the stock model, less those that are packed in ours."""
    stock = from_pretrained(exported)
    ours = from_pretrained(packed)
    gone = [name for name, m in ours.named_modules() if isinstance(m, DecodingExperts)]
    head = stock.get_output_embeddings()
    return {
        name
        for name, module in stock.named_modules()
        if isinstance(module, nn.Linear) and module is not head
        if not any(name.startswith(f"{path}.") for path in gone)
    }


@pytest.mark.parametrize("kind", TARGETS)
def test_targets(family: str, packed: Path, exported: Path, kind: str, caplog: Any) -> None:
    """Adapters on every target that is a linear module; experts skipped with one line."""
    leaves = {"named": {*ATTENTION, *MLP}, "regex": {"q_proj", "down_proj"}, "only of MLPs": {*MLP}}
    expected = {
        name
        for name in linear_outside_experts(exported, packed)
        if kind == "all-linear" or name.rpartition(".")[2] in leaves[kind]
    }
    with caplog.at_level(logging.WARNING, "erniequant"):
        model = get_peft_model(from_pretrained(packed), lora(TARGETS[kind]))
    assert adapted(model) == expected and expected
    assert [r.message for r in caplog.records if r.name == "erniequant"] == [
        "packed experts take no adapter and stay as they are; adapters go to the other targets"
    ]


def test_attention_alone_needs_no_word(packed: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "erniequant"):
        get_peft_model(from_pretrained(packed), lora(ATTENTION))
    assert not [r for r in caplog.records if r.name == "erniequant"]


@pytest.mark.parametrize("name", ["mlp.experts.down_proj", "gate_up_proj"])
def test_parameters_of_experts_are_refused(packed_ernie: Path, name: str) -> None:
    """As in a config made for, or an adapter trained on, the original."""
    with pytest.raises(ErnieQuantError, match="experts are packed and take no adapter"):
        get_peft_model(from_pretrained(packed_ernie), lora(ATTENTION, target_parameters=[name]))


def test_nothing_but_packed_mlps_is_refused(packed_dense: Path) -> None:
    config = lora(MLP, layers_to_transform=[0, 1])
    with pytest.raises(ErnieQuantError, match="nothing but packed"):
        get_peft_model(from_pretrained(packed_dense), config)


def test_other_models_are_none_of_our_business(micro_ernie: Path) -> None:
    """PEFT's own way with fused experts stays what it is for a plain model."""
    model = get_peft_model(from_pretrained(micro_ernie), lora([*ATTENTION, *MLP]))
    assert any(".experts" in name for name, _ in model.named_parameters() if "lora_" in name)


def _train(model: Any, family: str, folder: Path, **options: Any) -> float:
    """Some steps of a Trainer on one batch; returns how far its loss fell."""
    batch = inputs(family)
    rows = [{k: v[i] for k, v in batch.items() if len(v) == 2} for i in range(2)]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        rest = {k: v for k, v in batch.items() if k not in rows[0]}
        stacked = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        return {**stacked, **rest, "labels": stacked["input_ids"]}

    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=4, learning_rate=0.01, report_to=[],
        remove_unused_columns=False, save_strategy="no", logging_steps=1, use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[0] - losses[-1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer(
    family: str, packed: Path, dtype: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    base = from_pretrained(packed, dtype=dtype)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, lora("all-linear"))
    fell = _train(
        model, family, tmp_path, gradient_checkpointing=checkpointing, bf16=dtype == torch.bfloat16
    )
    assert fell > 0.05
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trainer_without_adapter_says_what_to_do(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(from_pretrained(packed), TrainingArguments(tmp_path, report_to=[], use_cpu=True))


def trained(packed: Path, family: str, **options: Any) -> Any:
    """A model with an adapter that matters."""
    model = get_peft_model(from_pretrained(packed, **options), lora("all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    return model(**inputs(family)).logits.float()


def test_save_and_load_the_adapter(family: str, packed: Path, tmp_path: Path) -> None:
    # In float32, which every road keeps: transformers rounds the adapter to the model's dtype.
    exact: dict[str, Any] = {"dtype": torch.float32}
    model = trained(packed, family, **exact)
    expected = logits(model, family)
    assert not torch.equal(expected, logits(from_pretrained(packed, **exact), family))
    model.save_pretrained(tmp_path)
    ours, _ = erniequant.load(packed, device="cpu", **exact)
    by_transformers = from_pretrained(tmp_path, **exact)
    roads = {
        "PeftModel": PeftModel.from_pretrained(from_pretrained(packed, **exact), tmp_path),
        "ours, then PeftModel": PeftModel.from_pretrained(ours, tmp_path),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(tmp_path, **exact),
        "by the adapter's folder": by_transformers,
    }
    for road, again in roads.items():
        difference = (logits(again.eval(), family) - expected).norm()
        assert difference <= 1e-6 * expected.norm(), road
    # `save_pretrained` takes an adapter of transformers' own alone. (Calling it with the newest
    # transformers asks for a PEFT that is not out yet.)
    assert by_transformers.hf_quantizer.get_state_dict_and_metadata(by_transformers) == (None, {})


def test_merge_into_what_is_not_packed(family: str, packed: Path, tmp_path: Path) -> None:
    """The merged model is a quantised checkpoint like any other."""
    model = trained(packed, family, dtype=torch.float32)
    expected = logits(model, family)
    merged = model.merge_and_unload()
    assert (logits(merged, family) - expected).norm() < 1e-5 * expected.norm()
    merged.save_pretrained(tmp_path / "merged")
    again, _ = erniequant.load(tmp_path / "merged", device="cpu")
    assert (logits(again, family) - expected).norm() < 1e-5 * expected.norm()
    erniequant.export(tmp_path / "merged", tmp_path / "plain", "fp32")
    plain = from_pretrained(tmp_path / "plain")
    assert (logits(plain, family) - expected).norm() < 1e-5 * expected.norm()


def test_adapter_gradients_agree_with_the_export(family: str, packed: Path, exported: Path) -> None:
    """The same adapter on the same attention: on packed weights and on decoded ones."""
    grads = []
    for folder in (packed, exported):
        torch.manual_seed(1)
        model = get_peft_model(from_pretrained(folder, dtype=torch.float32), lora(ATTENTION))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        batch = inputs(family)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 24
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm(), name


def test_compiled_adapter(packed_ernie: Path) -> None:
    model = trained(packed_ernie, "text", dtype=torch.float32)
    expected = logits(model, "text")
    found = torch.compile(model, backend="eager")(**inputs("text")).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()
    found.mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
