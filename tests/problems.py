"""Problems as data: a tiny model, samples to train it on and a seed, in one record with a readable id.

A new architecture is one entry of ``PROBLEMS``. Every model returns its loss when it is given labels, and gets the same
weights each time it is made. Token shapes: ``(batch, POSITIONS)``; the stack's inputs: ``(batch, WIDTH)``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY, POSITIONS, WIDTH, BLOCKS = 31, 8, 16, 3

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a test needs to train one model.

    Args:
        id: name in pytest's reports.
        build: makes the model.
        draw: makes one sample.
        seed: of weights and samples.
    """

    id: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Sample]
    seed: int = 0

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Make the model; the global random state stays as it is."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.build().to(dtype)

    def samples(self, number: int, dtype: torch.dtype = torch.float32) -> list[Sample]:
        """Draw samples, the first ones the same for any number."""
        generator = torch.Generator().manual_seed(self.seed)
        samples = [self.draw(generator) for _ in range(number)]
        return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in samples]


def transformer(kind: str, **options: object) -> nn.Module:
    sizes = dict(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options)))


def gpt2(dropout: float = 0.0) -> nn.Module:
    return transformer("gpt2", embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)


class MixingBlock(nn.Module):
    """A residual block that sees the mean of all earlier positions and is curved, in a few plain operations."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.past, self.down = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        past = x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]
        return h + self.down(torch.tanh(self.up(x) + self.past(past)))


class PlainLanguageModel(nn.Module):
    """No ``PreTrainedModel``: stem, blocks and head in plain sight, and a loss where there are labels."""

    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(MixingBlock(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def stem(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)

    def readout(self, y: Tensor) -> Tensor:
        return self.head(self.norm(y))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.stem(input_ids)
        for block in self.blocks:
            h = block(h)
        logits = self.readout(h)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class LayerBlock(nn.Module):
    def __init__(self, linear: bool, width: int = WIDTH) -> None:
        super().__init__()
        self.map, self.curve = nn.Linear(width, width), nn.Identity() if linear else nn.Tanh()

    def forward(self, h: Tensor) -> Tensor:
        return self.curve(self.map(h))


class Stack(nn.Module):
    """Stem, blocks of one layer, head, squared error; one vector a sample, so there is a single position."""

    def __init__(self, linear: bool = False, noisy: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(LayerBlock(linear, width) for _ in range(BLOCKS))
        if noisy:
            for block in self.blocks:
                block.curve = nn.Sequential(nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1))

    def stem(self, x: Tensor) -> Tensor:
        return self.first(x)

    def readout(self, y: Tensor) -> Tensor:
        return self.head(y)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits, labels)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        logits = self.readout(h)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def text(generator: torch.Generator) -> Sample:
    """A walk in small steps through the vocabulary: there is something to learn, and no pad token (0) in it."""
    start = torch.randint(VOCABULARY - 1, (1,), generator=generator)
    steps = torch.randint(1, 4, (POSITIONS,), generator=generator)
    ids = 1 + (start + steps.cumsum(0)) % (VOCABULARY - 1)
    return {"input_ids": ids, "labels": ids.clone()}


def padded_text(generator: torch.Generator) -> Sample:
    sample = text(generator)
    mask = (torch.arange(POSITIONS) < torch.randint(POSITIONS // 2, POSITIONS + 1, (1,), generator=generator)).long()
    return {
        "input_ids": sample["input_ids"] * mask,
        "labels": sample["labels"].masked_fill(mask == 0, -100),
        "attention_mask": mask,
    }


def vector(generator: torch.Generator) -> Sample:
    x = torch.randn(WIDTH, generator=generator)
    return {"x": x, "labels": x.roll(1).tanh()}


GPT2 = Problem("gpt2", gpt2, text)
DROPOUT = Problem("gpt2-dropout", lambda: gpt2(dropout=0.1), text)
PADDED = Problem("llama-padded", lambda: transformer("llama", num_key_value_heads=1), padded_text)
TUPLES = Problem("falcon-tuples", lambda: transformer("falcon"), text)  # its blocks return (hidden, attention)
PLAIN = Problem("plain-language-model", PlainLanguageModel, text)
MLP = Problem("mlp", lambda: Stack(), vector)
LINEAR = Problem("linear-stack", lambda: Stack(linear=True), vector)
NOISY = Problem("batch-norm-dropout", lambda: Stack(noisy=True), vector)

PROBLEMS = [GPT2, DROPOUT, PADDED, TUPLES, PLAIN, MLP, LINEAR, NOISY]
