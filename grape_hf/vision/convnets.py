"""The parts of the paper's convolutional networks: residual and plain chains of blocks, each with one linear head.

What lies before the global pool and the linear layer (``fc``) is a chain of blocks, each a submodule that returns one
tensor, so that feedback points can lie between them:

- residual networks: a stem (``conv1``, ``bn1``), then the blocks of ``layer1``, ``layer2``, ``layer3``;
- plain networks: ``blocks``, each convolution (+ norm) + ReLU (+ pool), the first of which is the stem as well. A
  hidden linear layer is one of them: on a C x k x k map it is a k x k convolution without padding, to a 1 x 1 map.

Shapes in the docstrings are channels x height x width at the default input size; other sizes work where the maps do
not shrink to nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import create_classifier
from torch import Tensor, nn


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
