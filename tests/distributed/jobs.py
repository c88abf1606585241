"""What the processes run: a training with everything that a test compares afterwards, by rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import problems
import torch
from helpers import count_hooks, make_trainer, weights
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from grape_hf import GrapeTrainer

BLOOM = problems.Problem("bloom", lambda: problems.transformer("bloom"), problems.text)  # no forward mode: its GELU


class Auxiliary(problems.PlainLanguageModel):
    """A head on each h_l beside the one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = torch.nn.ModuleList(torch.nn.Linear(problems.WIDTH, problems.VOCABULARY) for _ in self.blocks[1:])

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h, loss = self.stem(input_ids), 0.0
        for number, block in enumerate(self.blocks):
            h = block(h)
            if labels is not None and number < len(self.aux):
                loss = loss + 0.5 * self.loss(self.aux[number](h), labels)
        logits = self.readout(h).clone()  # FSDP2 warns of a view, whoever trains
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels) + loss, "logits": logits}


class Dropping(problems.PlainLanguageModel):
    """Leaves out a block in some forwards, the same on every rank: in the second the last, in the third the first."""

    calls = 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += self.training
        h = self.stem(input_ids)
        for number, block in enumerate(self.blocks):
            if not self.training or number != {2: 2, 3: 0, 5: 1}.get(self.calls):
                h = block(h)
        logits = self.readout(h)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


AUXILIARY = problems.Problem("auxiliary-heads", Auxiliary, problems.text)
DROPPING = problems.Problem("dropping", Dropping, problems.text)
PROBLEMS = {problem.id: problem for problem in (*problems.PROBLEMS, BLOOM, AUXILIARY, DROPPING)}


@dataclass
class Trained:
    """One rank's view of a training.

    Attributes:
        weights: all parameters, whole, and B_l.
        log: the log's history.
        wrapper: class of the wrapped model.
        hooks: hooks on the model's modules before and after.
    """

    weights: dict[str, Tensor]
    log: list[dict[str, Any]]
    wrapper: str
    hooks: tuple[int, int]


def as_if_on_gpus() -> dict[str, Any]:
    """Have accelerate take the two processes for GPUs', for on CPUs it has no FSDP and no other parallelism.

    Everything else is real: gloo, FSDP2 itself, the Trainer. Returns options that keep the Trainer from asking again.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState().distributed_type = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}


def train(
    problem: str,
    folder: Path,
    *,
    fsdp: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    resume: str | None = None,
    **options: Any,
) -> Trained:
    """Train a problem, by its id; with FSDP2 if its options are given."""
    if fsdp is not None:
        options |= {"fsdp": True, "fsdp_config": dict(fsdp), **as_if_on_gpus()}
    trainer = make_trainer(PROBLEMS[problem], folder, dtype=dtype, **options)
    before = count_hooks(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights(trainer).items()}
    plain = {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in whole.items()}
    hooks = before, count_hooks(trainer.model)
    return Trained(plain, trainer.state.log_history, type(trainer.model_wrapped).__name__, hooks)


class PlaceWatcher(GrapeTrainer):
    """Notes which sample stands at which place of the global batch, by what the Trainer says and by what is in it."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        samples = inputs["x"][:, 0].long().tolist()
        self.seen.update({(self.state.global_step, p): s for p, s in zip(self._places(inputs), samples, strict=True)})
        return loss


class Numbered(torch.utils.data.Dataset):
    """Samples for MLP that begin with their number."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples = [problems.vector(generator) for _ in range(samples)]
        for number, sample in enumerate(self.samples):
            sample["x"][0] = number

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


class Stream(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __init__(self, samples: int) -> None:
        self.samples = Numbered(samples).samples

    def __iter__(self) -> Any:
        return iter(self.samples)


def places(folder: Path, samples: int, stream: bool = False, **options: Any) -> dict[tuple[int, int], int]:
    """Return the sample by (optimiser step, place) of this rank's share of a training."""
    data = (Stream if stream else Numbered)(samples)
    trainer: Trainer = make_trainer(problems.MLP, folder, PlaceWatcher, more={"train_dataset": data}, **options)
    trainer.seen = {}
    trainer.train()
    return trainer.seen
