"""Adapters: found through the wrapper, only they are trained, and what is saved is an adapter's checkpoint.

The oracle of the gradients: LoRA's weight is W + s B A, so with G the gradient of that sum in a plain model, A gets
s B^T G and B gets s G A^T. Frozen parts in general are tested in test_losses.py.
"""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import LEARNED, arguments, assert_same, count_hooks, logged, weights
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from problems import GPT2, PADDED, Problem
from test_cost import CHECKPOINTING
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback

from grape_hf import GrapeTrainer
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries

# peft 0.19 where a base model has no name on the Hub, or shares its head with the embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
LLAMA = PADDED
COMMON = dict(task_type="CAUSAL_LM")
LORA = {
    GPT2: LoraConfig(target_modules=["c_attn"], r=2, init_lora_weights=False, fan_in_fan_out=True, **COMMON),
    LLAMA: LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **COMMON),
}
CONFIGS = {
    "lora": LORA[LLAMA],
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], r=2, use_dora=True, **COMMON),
    "lora-last-block": LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], r=2, **COMMON),
    "lora-and-head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2, **COMMON),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **COMMON),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **COMMON),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, **COMMON),
}


def adapted(problem: Problem, config: Any = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(problem.model(dtype), copy.deepcopy(config or LORA[problem])).to(dtype)


def make(model: nn.Module, problem: Problem, folder: Path, **options: Any) -> GrapeTrainer:
    args = arguments(folder, **{"per_device_train_batch_size": 8} | options)
    trainer = GrapeTrainer(model, args, train_dataset=problem.samples(8))  # all of the data in each step
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("problem", [GPT2, LLAMA], ids=lambda problem: problem.id)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_only_adapters_are_trained(problem, checkpointing, tmp_path):
    model = adapted(problem)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(model, problem, tmp_path, **{CHECKPOINTING: checkpointing}, **LEARNED)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    losses = [value for _, value in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert len(trainer.feedback) == 2
    assert all(not torch.equal(b, torch.eye(16)) for b in trainer.feedback)
    assert not any(
        hook.__module__.startswith("grape_hf") for m in model.modules() for hook in m._forward_hooks.values()
    )


@pytest.mark.parametrize("problem", [GPT2, LLAMA], ids=lambda problem: problem.id)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_of_adapters(problem, checkpointing):
    model = adapted(problem, dtype=torch.float64).train()
    merged = adapted(problem, dtype=torch.float64).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    if checkpointing:
        model.enable_input_require_grads()  # as the Trainer has it
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    batch = {name: torch.stack([s[name] for s in problem.samples(4)]) for name in problem.samples(1)[0]}
    B = [torch.randn(16, 16, dtype=torch.float64) for _ in range(2)]
    for wrapped in (model, merged):
        boundaries = Boundaries(list(find_blocks(wrapped).values()))
        with boundaries.attached(), boundaries.broadcast(B):
            wrapped(**batch).loss.backward()
    checked = 0
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        G = merged.get_submodule(name).weight.grad  # (out, in); GPT-2 keeps it transposed
        G = G.mT if problem is GPT2 else G
        A, low, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        torch.testing.assert_close(A.grad, scale * low.mT @ G)
        torch.testing.assert_close(low.grad, scale * G @ A.mT)
        checked += 1
    assert checked == (3 if problem is GPT2 else 6)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_kinds_of_adapters_learn(kind, tmp_path):
    model = adapted(LLAMA, CONFIGS[kind])
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = make(model, LLAMA, tmp_path, learning_rate=0.03, **LEARNED)
    trainer.train()
    losses = [value for _, value in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert trained
    assert all(not torch.equal(p, trained[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert len(trainer.feedback) == 2
    assert all(b.isfinite().all() for b in trainer.feedback)
    assert count_hooks(model) == 0


def test_checkpoints_are_of_adapters_and_resume(tmp_path):
    options = LEARNED | dict(save_strategy="steps", save_steps=5)
    straight = make(adapted(LLAMA), LLAMA, tmp_path / "straight", **options)
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-5"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "grape_feedback.safetensors"} <= files
    assert "model.safetensors" not in files
    resumed = make(adapted(LLAMA), LLAMA, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed), weights(straight))


def test_a_saved_adapter_opens_without_us(tmp_path):
    base = LLAMA.model()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(LORA[LLAMA]))
    trainer = make(model, LLAMA, tmp_path / "run", **LEARNED)
    trainer.train()
    trainer.save_model()
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.stack([s["input_ids"] for s in LLAMA.samples(2)])
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, model.eval()(ids).logits)


def test_a_quantised_base_is_refused(tmp_path):
    """By the flags that transformers sets and its Trainer asks for; there is no quantiser for CPUs here."""
    model = adapted(LLAMA)
    model.get_base_model().is_quantized = True
    model.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=True)
    with pytest.raises(ValueError, match="PeftModelForCausalLM is quantised.*unquantised.*bp"):
        GrapeTrainer(model, arguments(tmp_path), train_dataset=LLAMA.samples(4))
