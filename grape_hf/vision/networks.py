"""The convolutional networks of the paper's image tables, as timm models for small images.

``timm.create_model("resnet20_cifar", num_classes=100)`` makes one once this module is imported. All of them end in a
global pool and one linear layer (``fc``), and what lies before is a chain of blocks, each a submodule that returns one
tensor, so that feedback points can lie between them:

- residual networks: a stem (``conv1``, ``bn1``), then the blocks of ``layer1``, ``layer2``, ``layer3``;
- plain networks: ``blocks``, each convolution (+ norm) + ReLU (+ pool), the first of which is the stem as well. A
  hidden linear layer is one of them: on a C x k x k map it is a k x k convolution without padding, to a 1 x 1 map.

Shapes in the docstrings are channels x height x width at the default input size; other sizes work where the maps do
not shrink to nothing. The networks have no pretrained weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

# Names that register_model does not add by itself. It appends to this list, so it is one.
__all__ = ["TAG", "CifarResNet", "ConvBlock", "ConvNet", "ResidualBlock", "default_cfgs"]

# timm's models carry a tag that tells where their weights are from; ours tells which module makes them known to timm.
# It is in the name that transformers prints when a saved model is opened without that module.
TAG = "grape_hf.vision"

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)  # CIFAR-100's training set
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


class _Classifier(nn.Module):
    """What the networks have in common: the head, and timm's conventions about it."""

    num_classes: int
    num_features: int
    in_chans: int
    drop_rate: float
    feature_info: list[dict[str, Any]]

    def _make_head(self, global_pool: str) -> None:
        """Make ``global_pool`` and ``fc``; ``global_pool=""`` leaves maps, ``num_classes=0`` leaves ``fc`` out."""
        self.global_pool, self.fc = create_classifier(self.num_features, self.num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """Return the module that makes the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with fresh weights.

        Args:
            num_classes: number of logits; 0 for none.
            global_pool: kind of pool, as timm names them; the present one by default.
        """
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool)
        self.fc.to(parameter.device, parameter.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last block's maps, ``(batch, num_features, H, W)``, of images, ``(batch, in_chans, H, W)``."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for what ``forward_features`` returned, or with ``pre_logits`` the input of ``fc``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, num_classes)``, of images, ``(batch, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def _as_input(self, x: Tensor) -> Tensor:
        # transformers' pipeline makes every image RGB, also the grey ones that a network with one channel is for.
        return x.mean(1, keepdim=True) if self.in_chans == 1 and x.shape[1] == 3 else x


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut; ReLU on the sum.

    The shortcut is the identity, or where the shape changes a 1 x 1 convolution with batch norm (``downsample``).

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output.
        stride: by how much the maps shrink.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_chs, H, W)`` to ``(batch, out_chs, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.act2(residual + shortcut)


class CifarResNet(_Classifier):
    """The residual network of He et al. 2016 for CIFAR, with ``6 depth + 2`` layers.

    A 3 x 3 convolution to 16 channels, then three stages of ``depth`` blocks with 16, 32 and 64 channels; the second
    and the third stage halve the map. 3 x 32 x 32 -> 16 x 32 x 32 -> 32 x 16 x 16 -> 64 x 8 x 8 -> pool -> classes.

    One thing differs from the source: where the shape changes its shortcut is option A, every other pixel padded with
    zero channels, ours option B, a 1 x 1 convolution with batch norm (2,752 more parameters). The identity start of
    the feedback needs a linear shortcut that it can find and whose Jacobian it can read: a module with a weight.

    Args:
        depth: blocks in a stage: 3 for ResNet-20, 9 for ResNet-56.
        num_classes: number of logits.
        in_chans: channels of the images.
        global_pool: kind of pool, as timm names them.
        drop_rate: dropout before ``fc``; the source has none.

    Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2. Weights start as in
    torchvision's and timm's ResNets: He's normal by the fan-out, batch norms at 1 and 0.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1 = self._stage(16, 16, depth, stride=1)
        self.layer2 = self._stage(16, 32, depth, stride=2)
        self.layer3 = self._stage(32, 64, depth, stride=2)
        self.num_features = 64
        self.feature_info = [
            {"num_chs": 16, "reduction": 1, "module": "act1"},
            {"num_chs": 16, "reduction": 1, "module": "layer1"},
            {"num_chs": 32, "reduction": 2, "module": "layer2"},
            {"num_chs": 64, "reduction": 4, "module": "layer3"},
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._make_head(global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Run stem and blocks; ``(batch, in_chans, H, W)`` to ``(batch, 64, H / 4, W / 4)``."""
        x = self.act1(self.bn1(self.conv1(self._as_input(x))))
        return self.layer3(self.layer2(self.layer1(x)))

    @staticmethod
    def _stage(in_chs: int, out_chs: int, depth: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(in_chs, out_chs, stride)
        return nn.Sequential(first, *(ResidualBlock(out_chs, out_chs) for _ in range(depth - 1)))


class Unit(NamedTuple):
    """One block of a plain network: ``channels`` out, ``kernel`` x ``kernel``, and whether it halves the map.

    ``same`` pads the convolution so that the map keeps its size; a hidden linear layer takes the whole map instead.
    """

    channels: int
    kernel: int = 3
    pool: bool = False
    norm: bool = False
    same: bool = True


class ConvBlock(nn.Module):
    """Convolution, batch norm if asked for, ReLU, and 2 x 2 max pool if asked for.

    Weights start as He's normal: by the fan-in where there is no norm, which keeps the size of the activations from
    block to block (He et al. 2015), by the fan-out where there is one, as in torchvision's and timm's VGG. Biases at 0.

    Args:
        in_chs: channels of the input.
        unit: what the block is.
    """

    def __init__(self, in_chs: int, unit: Unit) -> None:
        super().__init__()
        padding = unit.kernel // 2 if unit.same else 0
        self.conv = nn.Conv2d(in_chs, unit.channels, unit.kernel, padding=padding, bias=not unit.norm)
        self.norm = nn.BatchNorm2d(unit.channels) if unit.norm else nn.Identity()
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2) if unit.pool else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out" if unit.norm else "fan_in", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_chs, H, W)`` to ``(batch, channels, H, W)``, or half of that where it pools."""
        return self.pool(self.act(self.norm(self.conv(x))))


class ConvNet(_Classifier):
    """A plain chain of blocks, a global pool and one linear layer.

    Args:
        units: the blocks, in order.
        num_classes: number of logits.
        in_chans: channels of the images.
        global_pool: kind of pool, as timm names them.
        drop_rate: dropout before ``fc``.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        channels = [in_chans, *(unit.channels for unit in units)]
        self.blocks = nn.Sequential(*(ConvBlock(c, unit) for c, unit in zip(channels[:-1], units, strict=True)))
        self.num_features = channels[-1]
        self.feature_info = []
        reduction = 1
        for i, unit in enumerate(units):
            # A linear layer's map has one position, whatever the size of the image.
            reduction *= (2 if unit.pool else 1) if unit.same else unit.kernel
            self.feature_info.append({"num_chs": unit.channels, "reduction": reduction, "module": f"blocks.{i}"})
        self._make_head(global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Run the blocks; ``(batch, in_chans, H, W)`` to ``(batch, num_features, H', W')``."""
        return self.blocks(self._as_input(x))


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
    brings to 74.66 % on CIFAR-10 and to 44.22 % on CIFAR-100, and gives no layers: these are ours.
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
