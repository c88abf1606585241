"""What cannot work is refused when a Trainer is made, or a trial of a search begins: before anything is trained.

Which devices and processes go with direct feedback is ``parallelism.py``'s business, which models ``points.py``'s and
``probe.py``'s.
"""

from typing import TYPE_CHECKING

from grape_hf.core.isolation import is_compiled
from grape_hf.engine.parallelism import refuse_parallelism
from grape_hf.presets import BASELINES
from grape_hf.training_args import GrapeArgumentsMixin

if TYPE_CHECKING:
    from transformers import Trainer


def refuse_settings(trainer: "Trainer", options: GrapeArgumentsMixin) -> None:
    """Refuse settings of a Trainer that do not go with the method; none with ``bp``.

    Raises:
        ValueError: with the setting's name and the way out.
    """
    method = options.method
    if method == "bp":
        return
    if method in BASELINES:
        _refuse_with_baseline(trainer, method)
    if trainer.args.fp16 and method in ("dkp", "pepita"):
        raise ValueError(f"fp16 scales the loss, and method={method!r} needs the error as it is. Use bf16 or fp32.")
    if getattr(trainer.model, "is_quantized", False):
        raise ValueError(
            f"{type(trainer.model).__name__} is quantised: estimates cannot differentiate its products, and without "
            "estimates it was never tried. Load the base unquantised (adapters go with bf16=True), or "
            'use method="bp".'
        )
    refuse_parallelism(trainer, options)
    checkpointing = getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {}  # by the new name the same
    # The Trainer takes the first two for itself; of what else is said, reentrant is torch's default.
    if checkpointing.keys() - {"every_n_layers", "offload"} and checkpointing.get("use_reentrant") is not False:
        raise ValueError(
            f"gradient_checkpointing_kwargs={checkpointing}: use_reentrant, which torch takes to be True where it "
            "is not given, cuts the gradients of blocks whose inputs need none, as all inputs of blocks do here. "
            'Say {"use_reentrant": False}, which is the default where nothing is said.'
        )


def _refuse_with_baseline(trainer: "Trainer", method: str) -> None:
    checkpointing = any(getattr(trainer.args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation"))
    refused = {
        "several processes": trainer.accelerator.num_processes > 1,
        "torch_compile": trainer.args.torch_compile,
        "a model that was compiled": is_compiled(trainer.model),
        "activation checkpointing": checkpointing,
        "bf16, whose resolution the difference of two passes needs": method == "pepita" and trainer.args.bf16,
    }
    if any(refused.values()):
        found = ", ".join(name for name, is_set in refused.items() if is_set)
        raise ValueError(
            f"method={method!r} is a baseline for small studies and does not go with {found}. Leave that out, "
            'or use method="grape", "dfa" or "bp".'
        )
