"""Train Hugging Face models with GrAPE: direct feedback to every block, learned while the model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grape_hf.trainer import GrapeMixin, GrapeTrainer
    from grape_hf.training_args import GrapeArgumentsMixin, GrapeTrainingArguments

__version__ = "0.1.0"
__all__ = ["GrapeArgumentsMixin", "GrapeMixin", "GrapeTrainer", "GrapeTrainingArguments"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: modules that need no torch are then there at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "grape_hf.training_args" if "Arguments" in name else "grape_hf.trainer"
    return getattr(import_module(module), name)
