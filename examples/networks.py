"""Networks for small images, made by name. All but "small" are as their papers define them:

- vgg16, vgg19: configurations D and E of Simonyan & Zisserman, ICLR 2015, but with BatchNorm and,
  as is usual at 32x32, one linear layer instead of three.
- resnet32, resnet110: He et al., CVPR 2016, section on CIFAR-10; shortcuts of type A.
- wrn20-8: Zagoruyko & Komodakis, BMVC 2016; widened by 8, no dropout. The 20 counts as He et al.
  do: 6n + 2 layers with n = 3 blocks a stage. Zagoruyko & Komodakis count 6n + 4 (the three 1x1
  convolutions of shortcuts too, the linear layer not): this network is their WRN-22-8.
- densenet40-12: Huang et al., CVPR 2017; growth 12, no bottleneck, compression or dropout.
- small: three convolutions, for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make_network(name: str, classes: int, channels: int = 3, size: int = 32) -> nn.Module:
    """A new network of NETWORKS: images (B, channels, size, size) float32 to logits (B, classes)
    float32. Its weights are drawn from torch's global generator. Raises ValueError for an unknown
    name, fewer than 2 classes, no channel, or a size below 8."""
    if name not in MAKERS:
        raise ValueError(f"expected a network of {', '.join(NETWORKS)}, got {name!r}")
    for what, value, least in (
        ("classes", classes, 2),
        ("channels", channels, 1),
        ("size", size, 8),
    ):
        if value < least:
            raise ValueError(f"expected {what} >= {least}, got {value}")
    network = MAKERS[name](classes, channels, size)
    for module in network.modules():  # He et al., ICCV 2015; PyTorch's default is another
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Keeps the size at stride 1. It has no bias, since a BatchNorm follows everywhere."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def normalized(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def small(classes: int, channels: int, size: int) -> nn.Module:
    """The image is halved by strides, which cost a quarter of a convolution with a pooling behind
    it. No average at the end: so short a network needs the place of a feature."""
    widths = (channels, 16, 32, 64)
    layers = [
        nn.Sequential(convolution(inputs, outputs, stride=2), normalized(outputs))
        for inputs, outputs in pairwise(widths)
    ]
    side = -(-size // 8)  # a stride of 2 rounds up
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, classes))


def vgg(classes: int, channels: int, size: int, *, deep: int) -> nn.Module:
    """`deep`: convolutions in each of the last three stages; the first two have 2."""
    layers: list[nn.Module] = []
    inputs = channels
    for width, count in ((64, 2), (128, 2), (256, deep), (512, deep), (512, deep)):
        for _ in range(count):
            layers += [convolution(inputs, width), normalized(width)]
            inputs = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # below size 32 a pixel would become none
    return nn.Sequential(*layers, head(inputs, classes))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut without parameters (type A): (B, inputs, H, W) to
    (B, outputs, H / stride, W / stride), sizes rounded up."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, outputs - inputs
        self.residual = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            normalized(outputs),
            convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(self.residual(x) + shortcut)


class WideBlock(nn.Module):
    """BatchNorm and ReLU come before each convolution; where the shape changes, the shortcut is a
    1x1 convolution that shares the first of them. Shapes as in ResidualBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = normalized(inputs)
        self.residual = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            normalized(outputs),
            convolution(outputs, outputs),
        )
        self.projection = None
        if inputs != outputs or stride != 1:
            self.projection = convolution(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(x)
        shortcut = x if self.projection is None else self.projection(active)
        return self.residual(active) + shortcut


def stages(
    block: Callable[[int, int, int], nn.Module], blocks: int, widths: list[int]
) -> nn.Module:
    """widths[0] are the channels before. Each stage but the first halves the size."""
    layers = []
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(block(inputs, outputs, 1 if stage == 0 else 2))
        layers += [block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


def resnet(classes: int, channels: int, size: int, *, blocks: int) -> nn.Module:
    return nn.Sequential(
        convolution(channels, 16),
        normalized(16),
        stages(ResidualBlock, blocks, [16, 16, 32, 64]),
        head(64, classes),
    )


def wide_resnet(classes: int, channels: int, size: int, *, blocks: int, widen: int) -> nn.Module:
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    return nn.Sequential(
        convolution(channels, 16),
        stages(WideBlock, blocks, widths),
        normalized(widths[-1]),
        head(widths[-1], classes),
    )


class DenseLayer(nn.Module):
    """(B, inputs, H, W) to (B, inputs + growth, H, W): the input, and what is new."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(normalized(inputs), convolution(inputs, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], dim=1)


def densenet(classes: int, channels: int, size: int, *, layers: int, growth: int) -> nn.Module:
    """Three dense blocks of so many `layers`, and transitions that halve the size."""
    width = 16
    parts: list[nn.Module] = [convolution(channels, width)]
    for block in range(3):
        if block > 0:
            parts += [normalized(width), convolution(width, width, kernel=1), nn.AvgPool2d(2)]
        for _ in range(layers):
            parts.append(DenseLayer(width, growth))
            width += growth
    return nn.Sequential(*parts, normalized(width), head(width, classes))


MAKERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "small": small,
    "vgg16": partial(vgg, deep=3),
    "vgg19": partial(vgg, deep=4),
    "resnet32": partial(resnet, blocks=5),
    "resnet110": partial(resnet, blocks=18),
    "wrn20-8": partial(wide_resnet, blocks=3, widen=8),
    "densenet40-12": partial(densenet, layers=12, growth=12),
}
NETWORKS = tuple(MAKERS)
