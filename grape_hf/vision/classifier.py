"""Any timm architecture as a transformers image classifier, with the weights that timm would start it from.

transformers' own bridge (``TimmWrapperForImageClassification``) is meant for pretrained weights. Made from a config
alone it draws every convolution and linear layer anew from N(0, 0.02) and sets every norm to 1 and 0, whatever timm
had prepared; and a model saved from such a config lacks what its image processor reads.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import filter_pretrained_cfg, get_arch_name, is_model
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from grape_hf.vision.networks import TAG, default_cfgs

# Of timm's description of pretrained weights these say how images become input, or which module is which, and remain
# true of weights that were never pretrained.
_KEPT = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
)


def image_classifier(architecture: str, labels: Sequence[str], **model_args: Any) -> TimmWrapperForImageClassification:
    """Make a transformers image classifier of any timm architecture, with fresh weights.

    The weights, and the state the random generator is left in, are those of ``timm.create_model``. The result works
    with ``Trainer``, ``save_pretrained`` and ``from_pretrained``, ``AutoModelForImageClassification``,
    ``AutoImageProcessor`` and ``pipeline("image-classification")``.

    Args:
        architecture: its name in timm, ours included.
        labels: names of the classes, in the order of their numbers.
        **model_args: further arguments of ``timm.create_model``, saved with the model: ``in_chans=1``,
            ``drop_rate=0.1``, ``img_size=32``. What else the image processor does is set by
            ``pretrained_cfg_overlay={"input_size": (3, 32, 32), "mean": ..., "std": ..., "crop_pct": 1.0}``. Where
            the images have another number of channels than ``mean`` and ``std``, their average serves every channel.

    Raises:
        ValueError: if timm knows no such architecture, if there are fewer than two labels, or if ``model_args`` holds
            what follows from the other arguments.
    """
    if not is_model(architecture):
        near = difflib.get_close_matches(get_arch_name(architecture), timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} knows no architecture {architecture!r}. Expected one of timm.list_models()"
            f"{', such as ' + ', '.join(near) if near else ''}."
        )
    if isinstance(labels, str) or len(labels) < 2:
        raise ValueError(f"labels={labels!r}: expected the names of at least two classes, in a list.")
    if "num_classes" in model_args:
        raise ValueError("num_classes is the number of labels: leave it out.")
    if "pretrained" in model_args:
        raise ValueError(
            "image_classifier makes fresh weights: leave `pretrained` out. For timm's pretrained weights use "
            f'AutoModelForImageClassification.from_pretrained("timm/{architecture}", num_labels={len(labels)}, '
            "ignore_mismatched_sizes=True)."
        )
    fresh = timm.create_model(architecture, num_classes=len(labels), **model_args)
    config = TimmWrapperConfig(
        architecture=f"{architecture}.{TAG}" if architecture in default_cfgs else architecture,
        model_args=model_args,
        pretrained_cfg=_processing(fresh, model_args),
        id2label=dict(enumerate(labels)),
        # As transformers does for the labels of ImageNet, two of which are cranes.
        label2id={label: i for i, label in enumerate(labels)} if len(set(labels)) == len(labels) else None,
    )
    with torch.random.fork_rng(devices=[]):
        model = TimmWrapperForImageClassification(config)
    # Loading, unlike replacing the module, keeps the marks by which transformers knows what it need not draw again.
    model.timm_model.load_state_dict(fresh.state_dict())
    return model


def loading_note(architecture: str) -> str | None:
    """Return what a model card must say about opening a saved model, or None where nothing is special.

    Args:
        architecture: as in the model's config.
    """
    if get_arch_name(architecture) not in default_cfgs:
        return None
    return (
        "The network is one of grape_hf's, which timm does not know by itself: `import grape_hf.vision` before opening "
        "it. Without that import the error says to upgrade timm, which does not help."
    )


def _processing(model: torch.nn.Module, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return what ``TimmWrapperImageProcessor`` reads from the config, true of the model as it was made."""
    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
    cfg = {name: cfg[name] for name in _KEPT if name in cfg}
    channels, *size = cfg["input_size"]
    channels = model_args.get("in_chans") or channels
    if img_size := model_args.get("img_size"):
        size = [img_size] * 2 if isinstance(img_size, int) else img_size
    cfg["input_size"] = (channels, *size)
    for name in ("mean", "std"):
        if len(cfg[name]) != channels:
            cfg[name] = (sum(cfg[name]) / len(cfg[name]),) * channels
    return cfg
