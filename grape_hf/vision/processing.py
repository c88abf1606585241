"""What a saved image classifier needs to read images as it was trained to: an image processor with its mean and std.

Colour images get the processor of transformers' ViT, which resizes and normalises and opens without grape_hf. For grey
ones there is none: `pipeline("image-classification")` turns every image into RGB, and a network of one input channel
needs them turned back.
"""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from transformers import AutoImageProcessor, PreTrainedConfig, ViTImageProcessor


class GreyImageProcessor(ViTImageProcessor):
    """ViT's image processor, for networks with one input channel; opens after ``import grape_hf.vision``."""

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Turn PIL images into grey ones first, by PIL's own weights: what was grey comes back unchanged."""
        if isinstance(image, Image):
            image = image.convert("L")
        return super().process_image(image, *args, **kwargs)


class _GreyConfig(PreTrainedConfig):
    """The registry of image processors goes by configurations; this one stands for no model."""

    model_type = "grape_hf_grey_images"


AutoImageProcessor.register(_GreyConfig, image_processor_classes={"torchvision": GreyImageProcessor}, exist_ok=True)


def image_processor(height: int, width: int, mean: Sequence[float], std: Sequence[float]) -> ViTImageProcessor:
    """Make the processor that gives a classifier the pixels that ``Images`` gave it in training, augmentation apart.

    Args:
        height: of the network's input; images of other sizes are resized, bilinearly.
        width: likewise.
        mean: of each channel, in [0, 1]; one channel makes a processor for grey images.
        std: of each channel.
    """
    kind = GreyImageProcessor if len(mean) == 1 else ViTImageProcessor
    return kind(size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std))
