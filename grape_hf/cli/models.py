"""A model and a batch for ``grape-hf inspect``, from a name alone: configurations are read, weights never.

A name is a folder or a configuration file, a repository on the Hub, ``timm:ARCHITECTURE``, or ``type:MODEL_TYPE`` for
the default configuration of a kind of transformers model.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

# Tried in order where the configuration does not say which class it was saved from.
_AUTO_CLASSES = (
    "AutoModelForMaskedLM",  # an encoder can be made a decoder, hardly a decoder an encoder
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
)
# Their losses take one class for each sample; those of language models, a token for each position.
_CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification")
_LANGUAGE_MODELS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")

Made = tuple[nn.Module, dict[str, Tensor]]


def maker(
    name: str, batch_size: int, sequence_length: int | None, image_size: int | None, overrides: dict[str, Any]
) -> tuple[str, Callable[[str], Made]]:
    """Return what a batch is, in words, and a function that makes the model and the batch on a device.

    Args:
        name: of the model, see above.
        batch_size: samples.
        sequence_length: tokens in each; default: 128, or as many positions as the model has.
        image_size: height and width of images; default: the model's.
        overrides: settings of the configuration, or arguments of timm's.

    Raises:
        OSError: if there is no such model, or the Hub is out of reach.
        ValueError: a name, setting or kind of model that is not known, or a length beyond the model's positions.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        from grape_hf.vision import image_classifier

        def network() -> nn.Module:
            labels = [str(i) for i in range(overrides.get("num_classes", 1000))]
            given = {key: value for key, value in overrides.items() if key != "num_classes"}
            return image_classifier(rest, labels, **given)

        with torch.device("meta"):
            config: Any = network().config
        return _images(network, config, batch_size, image_size)
    config = _configuration(name, kind, rest)
    if unknown := [key for key in overrides if not hasattr(config, key)]:
        near = difflib.get_close_matches(unknown[0], config.to_dict(), n=1)
        raise ValueError(
            f"{type(config).__name__} has no {', '.join(unknown)}{f'; is {near[0]} meant?' if near else '.'}"
        )
    for key, value in overrides.items():
        setattr(config, key, value)
    model_class, of_config = _model_class(config)
    if getattr(model_class, "main_input_name", "") == "pixel_values":
        return _images(of_config, config, batch_size, image_size)
    if getattr(model_class, "main_input_name", "") != "input_ids":
        raise ValueError(
            f"{model_class.__name__} reads {model_class.main_input_name}: expected a model of tokens or images."
        )
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    length = sequence_length or min(128, positions)
    if length > positions:
        raise ValueError(f"--sequence_length {length}: {name} has {positions} positions.")

    def tokens(device: str) -> Made:
        with torch.device(device):
            model = of_config()
            ids = torch.ones(batch_size, length, dtype=torch.long)
            batch = {"input_ids": ids} | _labels(model_class, config, ids)
        return model, batch

    return f"{batch_size} x {length} tokens", tokens


def _configuration(name: str, kind: str, rest: str) -> Any:
    if kind == "type":
        try:
            config = AutoConfig.for_model(rest)
            if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
                config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0  # T5's come with none
            return config
        except ValueError as error:
            known = list(transformers.CONFIG_MAPPING)
            near = difflib.get_close_matches(rest, known, n=3)
            raise ValueError(
                f"transformers {transformers.__version__} knows no model type {rest!r}"
                f"{'; is ' + ' or '.join(near) + ' meant?' if near else '.'}"
            ) from error
    if rest and not Path(name).exists():
        raise ValueError(f"{name!r}: expected timm:ARCHITECTURE, type:MODEL_TYPE, a folder or a name on the Hub.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name}: expected a folder with a config.json, found none in it.")
    return AutoConfig.from_pretrained(name)


def _model_class(config: Any) -> tuple[Any, Callable[[], nn.Module]]:
    if config.model_type == "timm_wrapper":
        import grape_hf.vision  # noqa: F401  registers our networks
    named: Any = getattr(transformers, next(iter(config.architectures or []), ""), None)
    headless = named is not None and re.search(r"(?<!LMHead)Model$", named.__name__)
    if named is not None and not headless:
        return named, lambda: named(config)
    stacked = ["AutoModelForSeq2SeqLM"] if getattr(config, "is_encoder_decoder", False) else []
    for auto_name in [*stacked, *_AUTO_CLASSES]:
        auto = getattr(transformers, auto_name)
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)], lambda: auto.from_config(config)  # noqa: B023  returned at once
    raise ValueError(
        f"model type {config.model_type!r}: expected a language model or a classifier of text or images, which "
        "transformers has for it in none of its Auto classes."
    )


def _labels(model_class: Any, config: Any, ids: Tensor) -> dict[str, Tensor]:
    if model_class.__name__.endswith(_LANGUAGE_MODELS):
        return {"labels": ids.clone()}
    if model_class.__name__.endswith(_CLASSIFIERS):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # classifiers on decoders look for the last token that is none
        return {"labels": torch.zeros(len(ids), dtype=torch.long)}
    if "decoder_input_ids" in inspect.signature(model_class.forward).parameters:
        return {"decoder_input_ids": ids.clone()}
    return {}


def _images(
    make: Callable[[], nn.Module], config: Any, batch_size: int, image_size: int | None
) -> tuple[str, Callable[[str], Made]]:
    channels, *sides = (getattr(config, "pretrained_cfg", None) or {}).get("input_size") or (
        getattr(config, "num_channels", 3),
        *_pair(getattr(config, "image_size", None) or 224),
    )
    channels = (getattr(config, "model_args", None) or {}).get("in_chans") or channels
    height, width = sides if image_size is None else (image_size, image_size)

    def images(device: str) -> Made:
        with torch.device(device):
            pixels = torch.zeros(batch_size, channels, height, width)
            return make(), {"pixel_values": pixels, "labels": torch.zeros(batch_size, dtype=torch.long)}

    return f"{batch_size} images of {channels} x {height} x {width}", images


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
