"""The convolutional networks of the paper's image tables, as timm models for small images.

``timm.create_model("resnet20_cifar", num_classes=100)`` makes one once this module is imported. What they are made of
is in ``convnets.py``. Shapes in the docstrings are channels x height x width at the default input size. The networks
have no pretrained weights.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from grape_hf.vision.convnets import CifarResNet, ConvNet, Unit

__all__ = ["TAG", "default_cfgs"]  # register_model appends the networks' own names

# timm's models carry a tag that tells where their weights are from; ours tells which module makes them known to timm.
# It is in the name that transformers prints when a saved model is opened without that module.
TAG = "grape_hf.vision"

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)  # CIFAR-100's training set
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


def _cfg(first_conv: str, **values: Any) -> dict[str, Any]:
    # crop_pct: timm would enlarge the image by 1 / 0.875 and cut out the middle.
    usual = {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (1, 1),
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": first_conv,
        "classifier": "fc",
        "license": "apache-2.0",
    }
    return usual | values


default_cfgs = generate_default_cfgs(
    {
        f"mnist_cnn.{TAG}": _cfg(
            "blocks.0.conv", num_classes=10, input_size=(1, 28, 28), mean=MNIST_MEAN, std=MNIST_STD
        ),
        f"cifar_cnn.{TAG}": _cfg("blocks.0.conv"),
        f"alexnet_cifar.{TAG}": _cfg("blocks.0.conv"),
        f"vgg16_cifar.{TAG}": _cfg("blocks.0.conv"),
        f"resnet20_cifar.{TAG}": _cfg("conv1", pool_size=(8, 8)),
        f"resnet56_cifar.{TAG}": _cfg("conv1", pool_size=(8, 8)),
    }
)


@register_model
def mnist_cnn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Two convolutions and a hidden linear layer for MNIST, without norms; 421,642 parameters.

    1 x 28 x 28 -> 32 x 14 x 14 -> 64 x 7 x 7 -> 128 -> 10. The paper's summary names an MNIST-CNN that BP brings to
    99.03 % and gives no layers: these are ours, the widths of PyTorch's MNIST example.
    """
    units = [Unit(32, pool=True), Unit(64, pool=True), Unit(128, kernel=7, same=False)]
    return build_model_with_cfg(ConvNet, "mnist_cnn", pretrained, units=units, **kwargs)


@register_model
def cifar_cnn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Three convolutions and a hidden linear layer for CIFAR, without norms; 643,492 parameters for 100 classes.

    3 x 32 x 32 -> 32 x 16 x 16 -> 64 x 8 x 8 -> 128 x 4 x 4 -> 256 -> classes. The paper's summary names a CNN that BP
    brings to 74.66 % on CIFAR-10 and to 44.22 % on CIFAR-100, and gives no layers: these are ours, meant to end near
    the same figures.
    """
    units = [Unit(32, pool=True), Unit(64, pool=True), Unit(128, pool=True), Unit(256, kernel=4, same=False)]
    return build_model_with_cfg(ConvNet, "cifar_cnn", pretrained, units=units, **kwargs)


@register_model
def alexnet_cifar(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """AlexNet for 32 x 32: five convolutions with batch norm, two hidden linear layers.

    3 x 32 x 32 -> 64 x 16 x 16 -> 192 x 8 x 8 -> 384 -> 256 -> 256 x 4 x 4 -> 1024 -> 1024 -> classes.

    Widths of the convolutions, and pools after the first, second and fifth, as in Krizhevsky's one-column AlexNet
    (2014; torchvision's). Ours, as the paper's summary gives BP's 64.61 % and no layers: small kernels and no strides,
    for the map would be gone; batch norm in place of response normalisation; hidden layers of 1,024 rather than 4,096,
    for an input of 4,096 rather than 9,216; no dropout unless asked for. The linear layers are blocks, without norm (a
    last batch of one image has no statistics on a 1 x 1 map): the head stays one linear layer, as in all the others,
    and the direct feedback has every hidden layer.
    """
    convolutions = [
        Unit(64, kernel=5, pool=True, norm=True),
        Unit(192, kernel=5, pool=True, norm=True),
        Unit(384, norm=True),
        Unit(256, norm=True),
        Unit(256, pool=True, norm=True),
    ]
    units = [*convolutions, Unit(1024, kernel=4, same=False), Unit(1024, kernel=1)]
    return build_model_with_cfg(ConvNet, "alexnet_cifar", pretrained, units=units, **kwargs)


@register_model
def vgg16_cifar(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """VGG-16 with batch norm for 32 x 32: thirteen 3 x 3 convolutions, and one linear layer in place of three.

    3 x 32 x 32 -> 64 x 16 x 16 -> 128 x 8 x 8 -> 256 x 4 x 4 -> 512 x 2 x 2 -> 512 x 1 x 1 -> classes.

    Source: Simonyan & Zisserman 2015, configuration D. The head is the usual one on CIFAR, where the last map has one
    position.
    """
    stages = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    units = [Unit(c, pool=i == depth - 1, norm=True) for c, depth in stages for i in range(depth)]
    return build_model_with_cfg(ConvNet, "vgg16_cifar", pretrained, units=units, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32 x 32: three blocks a stage, 272,474 parameters for 10 classes; see ``CifarResNet``."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for 32 x 32: nine blocks a stage, 855,770 parameters for 10 classes; see ``CifarResNet``."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=9, **kwargs)
