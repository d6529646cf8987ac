"""Networks for small images, as functions of the number of classes, the channels and the size."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

SMALLEST = 8  # pixels


def make_network(name: str, classes: int, channels: int = 3, size: int = 32) -> nn.Module:
    """A new network with random weights that maps images (B, channels, size, size) float32 to
    logits (B, classes) float32. Raises ValueError for a name that is not in NETWORKS, for fewer
    than 2 classes, no channels or a size below 8."""
    if name not in NETWORKS:
        raise ValueError(f"expected a network of {', '.join(NETWORKS)}, got {name!r}")
    for what, value, least in (
        ("classes", classes, 2),
        ("channels", channels, 1),
        ("size", size, SMALLEST),
    ):
        if value < least:
            raise ValueError(f"expected {what} >= {least}, got {value}")
    network = MAKERS[name](classes, channels, size)
    initialise(network)
    return network


def initialise(network: nn.Module) -> None:
    """He initialisation (He et al., ICCV 2015), as in the papers of these networks."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Without a bias: a BatchNorm takes it away."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        convolution(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def small(classes: int, channels: int, size: int) -> nn.Module:
    """Three convolutions for CPUs. They halve the image by their stride, which costs a quarter of
    a convolution before a pooling; no pooling at the end either, as in so short a network the
    place of a feature still tells much about the class."""
    widths = (16, 32, 64)
    units = [unit(a, b, stride=2) for a, b in zip((channels, *widths), widths, strict=False)]
    side = -(-size // 2 ** len(widths))  # a stride of 2 rounds up
    return nn.Sequential(*units, nn.Flatten(), nn.Linear(widths[-1] * side**2, classes))


MAKERS: dict[str, Callable[[int, int, int], nn.Module]] = {"small": small}
NETWORKS = tuple(MAKERS)
