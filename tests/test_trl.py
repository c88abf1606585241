"""trl's trainers with the mixin: supervised fine-tuning, and preferences, which take several forwards for a loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import LEARNED, OnEvent, arguments, logged
from peft import LoraConfig
from problems import transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from grape_hf import GrapeArgumentsMixin, GrapeMixin
from grape_hf.core.boundaries import Boundaries

# By default trl runs in bf16 and checkpoints activations, the latter by the name that transformers 5.23 has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")


class SFTArguments(GrapeArgumentsMixin, SFTConfig):
    pass


class DPOArguments(GrapeArgumentsMixin, DPOConfig):
    pass


class GrapeSFT(GrapeMixin, SFTTrainer):
    pass


class GrapeDPO(GrapeMixin, DPOTrainer):
    pass


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model() -> nn.Module:
    torch.manual_seed(0)
    return transformer("llama", num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1)


def counting(start: int, length: int, step: int = 1) -> str:
    return " ".join(WORDS[(start + i * step) % 10] for i in range(length))


SFT_DATA = {"text": [counting(i, 4 + i % 3) for i in range(16)]}
DPO_DATA = {
    "prompt": [counting(i, 3) for i in range(16)],
    "chosen": [" " + counting(i + 3, 3) for i in range(16)],
    "rejected": [" " + counting(i + 3, 2 + i % 3, step=3) for i in range(16)],
}
KINDS = {
    "sft": (GrapeSFT, SFTArguments, SFT_DATA, {}),
    "dpo": (GrapeDPO, DPOArguments, DPO_DATA, {"ref_model": True}),
}


def make(kind: str, folder: Path, trainer: Any = None, **options: Any) -> Any:
    ours, arguments_kind, data, more = KINDS[kind]
    args = arguments(folder, arguments_kind, **{"max_length": 16, "per_device_train_batch_size": 16} | options)
    made = (trainer or ours)(
        model=model(),
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        **{name: another_model() for name in more},
    )
    made.remove_callback(PrinterCallback)
    return made


def another_model() -> nn.Module:
    other = model()  # seeded
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


def our_hooks(trainer: Any) -> list[Any]:
    """Hooks of grape_hf; transformers and trl have their own."""
    hooks = [h for m in trainer.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if hook.__module__.startswith("grape_hf")]


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_learns(kind, tmp_path):
    trainer = make(kind, tmp_path, **LEARNED)
    seen = []
    trainer.add_callback(OnEvent("step_end", lambda state, **_: seen.append(len(our_hooks(trainer)))))
    trainer.train()
    losses = [value for _, value in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert len(trainer.feedback) == 2
    assert all(0 < (b - torch.eye(16)).norm() < 4 for b in trainer.feedback)  # from the identity, not far from it
    assert logged(trainer, "grape/alignment/estimate/mean")
    assert len(set(seen)) == 1
    assert seen[0] > 3  # two boundaries and y, and what the model is called with
    assert not our_hooks(trainer)


def log_probability(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0]
    return sum(logits[i - 1].log_softmax(-1)[ids[0, i]] for i in range(len(prompt), ids.shape[1]))


def sft_loss(model: nn.Module, rows: Dataset) -> Tensor:
    total = -sum(log_probability(model, row["input_ids"][:1], row["input_ids"][1:]) for row in rows)
    return total / sum(len(row["input_ids"]) - 1 for row in rows)


def dpo_loss(model: nn.Module, rows: Dataset) -> Tensor:
    """Two forwards for each sample, and two of the reference."""
    total = torch.zeros(())
    for row in rows:
        pairs = [(row["prompt_ids"], row[f"{which}_ids"]) for which in ("chosen", "rejected")]
        chosen, rejected = (log_probability(model, *pair) for pair in pairs)
        with torch.no_grad():
            chosen_0, rejected_0 = (log_probability(another_model(), *pair) for pair in pairs)
        total = total - F.logsigmoid(0.1 * ((chosen - chosen_0) - (rejected - rejected_0)))
    return total / len(rows)


@pytest.mark.parametrize(("kind", "loss"), [("sft", sft_loss), ("dpo", dpo_loss)])
def test_gradients_are_those_of_a_star_by_hand(kind, loss, tmp_path):
    """Text by text, without padding, head kernel, checkpointing or Trainer."""
    one_step = dict(
        max_steps=1, bf16=False, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=1e9
    )
    trainer = make(kind, tmp_path, method="dfa", feedback_init="gaussian", **one_step)
    trainer.train()
    assert trainer.args.gradient_checkpointing
    by_hand = model()
    boundaries = Boundaries(list(by_hand.model.layers))
    with boundaries.attached(), boundaries.broadcast(trainer.feedback):
        loss(by_hand, trainer.train_dataset).backward()
    for (name, p), after in zip(by_hand.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(
            after, p - p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any(not torch.allclose(p.grad, torch.zeros(()), atol=1e-3) for p in by_hand.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
def test_bp_is_the_stock_trainer(kind, tmp_path):
    stock = {"sft": SFTTrainer, "dpo": DPOTrainer}[kind]
    ours, theirs = (make(kind, tmp_path, trainer=t, method="bp") for t in (None, stock))
    for trainer in (ours, theirs):
        trainer.train()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logits_space_without_a_head_to_hook_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match='without calling the head: use feedback_space="hidden"'):
        make("sft", tmp_path, feedback_space="logits").train()


def test_dpo_with_adapters_whose_reference_is_the_base(tmp_path):
    """The reference forward is of the same model, without gradients, its adapters switched off."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    args = arguments(tmp_path, DPOArguments, max_length=16, per_device_train_batch_size=16, **LEARNED)
    trainer = GrapeDPO(
        model=model(),
        args=args,
        train_dataset=Dataset.from_dict(DPO_DATA),
        processing_class=tokenizer(),
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora" in name}
    losses = [value for _, value in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert len(trainer.feedback) == 2
    assert all(not torch.equal(b, torch.eye(16)) for b in trainer.feedback)


def test_token_counters_are_the_stock_trainers(tmp_path):
    """trl counts tokens and keeps metrics inside its loss, which runs once for each batch."""
    counted = []
    for trainer, options in ((SFTTrainer, {"method": "bp"}), (None, LEARNED | {"alignment_steps": 1})):
        made = make("sft", tmp_path, trainer, **options, max_steps=4, per_device_train_batch_size=4)
        made.train()
        counted.append([value for _, value in logged(made, "num_tokens")])
    assert counted[0] == counted[1]
    assert counted[0][-1] > counted[0][0] > 0
