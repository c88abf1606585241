"""Parts of a model by the methods and names that transformers, timm and peft give them: encoder, decoder, head."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn


def find_encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder, whose blocks see another sequence than y; None for any other model."""
    found = stacks(model)
    return found[0] if found else None


def find_head(model: nn.Module) -> nn.Module:
    """Return the module whose output are the logits, for ``feedback_space="logits"``.

    It is what ``get_output_embeddings()`` returns (language models), else the one that a Hugging Face classifier
    calls ``classifier``, ``score`` or ``head``, or a timm model names in ``get_classifier()``.

    Raises:
        ValueError: if the model has no such module.
    """
    for candidate in unwrapped(model):
        get_output_embeddings = getattr(candidate, "get_output_embeddings", None)
        get_classifier = getattr(candidate, "get_classifier", None)
        heads = [get() for get in (get_output_embeddings, get_classifier) if callable(get)]
        heads += [getattr(candidate, name, None) for name in ("classifier", "score", "lm_head", "head", "fc")]
        for head in heads:
            if isinstance(head, nn.Module) and not isinstance(head, nn.Identity):
                return head
    raise ValueError(
        f'feedback_space="logits" needs a module that makes the logits, and {type(model).__name__} has none: '
        "get_output_embeddings() and get_classifier() return no module, and there is no classifier, score, lm_head, "
        'head or fc. Use feedback_space="hidden", which measures the error at the output of the last block.'
    )


def stacks(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Encoder and decoder of a model that has both, side by side: transformers' or torch's (``nn.Transformer``)."""
    candidate: Any  # get_encoder and get_decoder are transformers'
    for candidate in unwrapped(model):
        if getattr(getattr(candidate, "config", None), "is_encoder_decoder", False) is True:
            encoder, decoder = candidate.get_encoder(), candidate.get_decoder()
            nested = encoder in set(decoder.modules()) or decoder in set(encoder.modules())
            return None if nested else (encoder, decoder)
    encoders, decoders = (
        [m for m in model.modules() if isinstance(m, kind)] for kind in (nn.TransformerEncoder, nn.TransformerDecoder)
    )
    if len(encoders) != 1 or len(decoders) != 1:
        return None
    # Where the batch comes second the positions of an encoder cannot be told from samples.
    (encoder,), (decoder,) = encoders, decoders
    first = all(getattr(m, "batch_first", True) for m in encoder.modules())
    return (encoder, decoder) if first else None


def encoder_rests(model: nn.Module, encoder: nn.Module, decoder: nn.Module) -> bool:
    """Whether no error need reach an encoder: all that trains is in the decoder or the head, and so above it.

    Source embeddings below a frozen encoder, or prompts, would be trained through it.
    """
    trained = {p for p in model.parameters() if p.requires_grad}
    above = set(decoder.parameters())
    if trained.isdisjoint(above) or not trained.isdisjoint(encoder.parameters()):
        return False
    with suppress(ValueError):  # without a head
        above |= set(find_head(model).parameters())
    return trained <= above


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, outermost first (peft's PeftModel, timm's wrapper in transformers)."""
    yield model
    for name in ("base_model", "model", "timm_model"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and inner is not model:
            yield from unwrapped(inner)
            return
