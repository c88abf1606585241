"""Image classifiers: the paper's small networks as timm models, and any timm model as a transformers one.

Importing this registers ``mnist_cnn``, ``cifar_cnn``, ``alexnet_cifar``, ``vgg16_cifar``, ``resnet20_cifar`` and
``resnet56_cifar`` with timm. A saved model of one of them opens only where this was imported before (``loading_note``).
"""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"grape_hf.vision needs timm: pip install '.[vision]' in a checkout of grape_hf ({error})."
    ) from error

from grape_hf.vision import networks
from grape_hf.vision.classifier import image_classifier, loading_note

__all__ = ["image_classifier", "loading_note", "networks"]
