"""What does not go with stages is refused when the Trainer is made, by the name of its setting."""

import warnings
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import problems
import pytest
import stages
import torch
from helpers import make_trainer
from safetensors.torch import load_file
from test_trainer import CHECKPOINTING

from grape_hf.pipeline.cuts import balanced_cuts, given_cuts
from grape_hf.pipeline.micro_batches import cut


def t5() -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = dict(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=31, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))


class Skipping(problems.PlainLanguageModel):
    """What its head reads is the sum of the last block's output and the first one's input."""

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        h = first = self.stem(input_ids)
        for block in self.blocks:
            h = block(h)
        logits = self.readout(h + first)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class Between(problems.PlainLanguageModel):
    """A norm that is trained between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = torch.nn.LayerNorm(problems.WIDTH)

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        h = self.blocks[1](self.middle(self.blocks[0](self.stem(input_ids))))
        return {"loss": self.loss(self.readout(self.blocks[2](h)), labels)}


class Shared(problems.PlainLanguageModel):
    """All blocks have one linear layer in common."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block.up = self.blocks[0].up


class ChannelsFirst(problems.PlainLanguageModel):
    """Convolutions along the positions, as many of them as channels, which are in front of them."""

    def __init__(self) -> None:
        super().__init__()
        convolution = torch.nn.Conv1d(problems.WIDTH, problems.WIDTH, 3, padding=1)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(deepcopy(convolution), torch.nn.GELU()) for _ in range(3))

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        h = self.stem(input_ids).mT
        for block in self.blocks:
            h = block(h)
        logits = self.readout(h.mT)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


GPT2 = stages.gpt2()
# By what the message names: options, and the model where it is not GPT-2.
REFUSED: dict[str, tuple[dict[str, Any], Any]] = {
    "torch_compile": ({"torch_compile": True}, GPT2),
    "a compiled model": ({}, lambda: torch.compile(GPT2(), backend="eager")),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, GPT2),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 1.0}, GPT2),
    "bf16_full_eval": ({"bf16_full_eval": True}, GPT2),
    "enable_jit_checkpoint": ({"enable_jit_checkpoint": True}, GPT2),
    "optim='lomo'": ({"optim": "lomo"}, GPT2),
    "'dispatch_batches': True": ({"accelerator_config": {"dispatch_batches": True}}, GPT2),
    "'split_batches': True": ({"accelerator_config": {"split_batches": True}}, GPT2),
    "eval_use_gather_object": ({"eval_use_gather_object": True}, GPT2),
    "method='fa'": ({"method": "fa"}, GPT2),
    "feedback_rule='cosine'": ({"method": "grape", "feedback_rule": "cosine"}, GPT2),
    "feedback_rule='lms'": ({"method": "grape", "jvp_fraction": 0.5}, GPT2),
    "feedback_points=2": ({"method": "dfa", "feedback_points": 2}, GPT2),
    'feedback_space="logits"': ({"method": "dfa", "feedback_space": "logits"}, GPT2),
    "feedback_sharing='none'": ({"method": "dfa", "feedback_sharing": "none"}, GPT2),
    "feedback_sweeps=1": ({"method": "dfa", "feedback_sweeps": 1}, GPT2),
    'feedback_path="shortcut"': ({"method": "dfa", "feedback_path": "shortcut"}, GPT2),
    "calibration_refit": (
        {"method": "dfa", "calibration_strategy": "steps", "calibration_refit": True},
        GPT2,
    ),
    "fallback": ({"method": "dfa", "fallback": "bp", "alignment_steps": 1}, GPT2),
    "pipeline_split='3,2'": ({"pipeline_split": "3,2"}, GPT2),
    "pipeline_stages=2: the model has 1 blocks": ({}, lambda: problems.PlainLanguageModel(blocks=1)),
    "expects that all blocks return (batch, positions, n)": ({"method": "grape"}, ChannelsFirst),
    "an encoder-decoder": ({}, t5),
    "blocks 2 to 3": ({}, Skipping),
    "middle runs between blocks.0": ({}, Between),
    "is a parameter of another stage": ({}, Shared),
    "its main input is x": ({}, lambda: problems.Stack()),
}


def refusals(folder: Path, names: list[str]) -> dict[str, str]:
    """What is said to each."""
    found = {}
    for name in names:
        options, build = REFUSED[name]
        problem = problems.Problem("refused", build, problems.text)
        try:
            make_trainer(problem, folder, **({"method": "bp", "pipeline_stages": 2, "ddp_timeout": 20} | options))
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "not refused"
    return found


def reentrant(folder: Path, options: dict[str, Any]) -> str:
    """What is said of reentrant checkpointing that was switched on behind the Trainer's back."""
    problem = problems.Problem("reentrant", GPT2, problems.text)
    trainer = make_trainer(problem, folder, **({"pipeline_stages": 2, "ddp_timeout": 6, "max_steps": 1} | options))
    getattr(trainer.model, f"{CHECKPOINTING}_enable")({"use_reentrant": True})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of inputs without gradients
            trainer.train()
    except RuntimeError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("method", [{"method": "dfa"}, {"method": "grape"}])
def test_reentrant_checkpointing(method, processes, tmp_path):
    said = processes.run_on(2, reentrant, tmp_path, method)
    assert not any(text == "trained" for text in said)
    assert any("use_reentrant" in text for text in said), said


def saved(folder: Path) -> tuple[str, int]:
    """What is said of a stage that is saved by itself, and how many tensors the Trainer saves."""
    problem = problems.Problem("saved", GPT2, problems.text)
    trainer = make_trainer(problem, folder, method="bp", pipeline_stages=2, ddp_timeout=20, max_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "whole"))
    with pytest.raises(RuntimeError) as error:
        trainer.model.save_pretrained(folder / "stage")
    assert not (folder / "stage").exists()
    return str(error.value), len(load_file(folder / "whole" / "model.safetensors"))


def test_a_stage_is_not_saved_for_the_whole(processes, tmp_path):
    whole = len(GPT2().state_dict())
    for said, number in processes.run_on(2, saved, tmp_path):
        assert "trainer.save_model(folder)" in said
        assert whole - 1 <= number <= whole  # the head may be the embeddings


def test_settings_and_models(processes, tmp_path):
    for told in processes.run_on(2, refusals, tmp_path, list(REFUSED)):
        for name, message in told.items():
            assert message.startswith("ValueError: ")
            assert name in message
            assert "pipeline_s" in message
            assert any(way in message for way in ("Use ", "Train with", "Evenly", "Expected", "train with"))


def test_a_single_process(tmp_path):
    with pytest.raises(ValueError, match=r"expected a multiple of 2 processes, found 1\. .*--num_processes 2"):
        make_trainer(problems.GPT2, tmp_path, method="bp", pipeline_stages=2)


def test_what_the_launcher_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp does not go with pipeline_stages"):
        make_trainer(problems.GPT2, tmp_path, method="bp", pipeline_stages=2)


def test_what_is_known_later(processes, tmp_path):
    said = processes.run_on(2, refused_later, tmp_path)
    for told in said:
        assert "optimizers=" in told[0]
        assert "hyperparameter_search" in told[1]


def refused_later(folder: Path) -> list[str]:
    found, model = [], problems.GPT2.model()
    try:
        optimizer = torch.optim.SGD(model.parameters())
        more = {"model": model, "optimizers": (optimizer, None)}
        make_trainer(problems.GPT2, folder, method="bp", pipeline_stages=2, more=more)
    except ValueError as error:
        found.append(str(error))
    more = {"model_init": problems.GPT2.model}
    trainer = make_trainer(problems.GPT2, folder, method="bp", pipeline_stages=2, more=more, **{CHECKPOINTING: True})
    try:
        trainer.hyperparameter_search(n_trials=1)
    except ValueError as error:
        found.append(str(error))
    return found


def test_cuts_are_even_given_or_balanced():
    assert given_cuts(None, 7, 3) == [0, 2, 4, 7]
    assert given_cuts("1, 4,2", 7, 3) == [0, 1, 5, 7]
    # By hand: 3 blocks of 1 and a head of 2 are 3 | 2 at best, a stem of 2 makes it 3 | 4, or 4 | 3.
    assert balanced_cuts([1, 1, 1], 2, head=2) == [0, 2, 3]
    assert balanced_cuts([1, 1, 1, 1], 2, stem=3) == [0, 1, 4]
    # Against all cuts there are.
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    every = [[0, a, b, 7] for a in range(1, 6) for b in range(a + 1, 7)]

    def slowest(cuts: list[int]) -> float:
        return max(sum(costs[i:j]) for i, j in pairwise(cuts))

    assert slowest(balanced_cuts(costs, 3)) == min(map(slowest, every))


def test_micro_batches_count_what_they_have_labels_for():
    labels = torch.tensor([[5, 5, -100], [5, -100, -100], [7, 8, 9], [7, 8, 9]])
    batch = {"input_ids": labels, "labels": labels, "position_ids": torch.arange(3)[None]}
    halves = cut(batch, "input_ids", 3, shifted=False)  # 3 does not divide 4
    assert halves.shares == [3 / 9, 6 / 9]
    assert all(part["position_ids"].shape == (1, 3) for part in halves.parts)
    # Without the first label of each the second quarter would have none.
    assert len(cut(batch, "input_ids", 4, shifted=True)) == 1
    assert cut(batch, "input_ids", 2, shifted=True).shares == [1 / 5, 4 / 5]
    assert (
        cut({"pixel_values": torch.zeros(6, 1), "labels": torch.zeros(6)}, "pixel_values", 4, False).shares
        == [1 / 3] * 3
    )
