"""Train Hugging Face models with GrAPE: direct feedback to every block, learned from forward-mode derivatives."""

from grape_hf.trainer import GrapeMixin, GrapeTrainer
from grape_hf.training_args import GrapeArgumentsMixin, GrapeTrainingArguments

__version__ = "0.1.0"
__all__ = ["GrapeArgumentsMixin", "GrapeMixin", "GrapeTrainer", "GrapeTrainingArguments"]
