"""The networks of the study are those of their papers: layers, parameters and shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS, ResidualBlock, make_network

# Parameters (in millions, at 10 classes) and layers as the papers print them. WRN-22-8 is what
# Zagoruyko & Komodakis call wrn20-8; the 1x1 convolutions of its shortcuts are not of the 20.
PUBLISHED = {
    "resnet32": ("0.46", 32),
    "resnet110": ("1.7", 110),
    "wrn20-8": ("17.2", 20),
    "densenet40-12": ("1.0", 40),
}
VGG = {"vgg16": (138, 16), "vgg19": (144, 19)}  # with their three linear layers, at 1000 classes
VGG_LINEAR = (512 * 7 * 7 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 1000


def millions(parameters: int, digits: int) -> str:
    return f"{parameters / 1e6:.{digits}f}"


def layers(network: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.endswith("projection")
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_and_parameters_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        network = make_network(name, 10)
    published, depth = PUBLISHED[name]
    parameters = sum(p.numel() for p in network.parameters())
    assert millions(parameters, len(published.split(".")[1])) == published
    assert len(layers(network)) == depth


@pytest.mark.parametrize("name", VGG)
def test_vgg_has_the_published_convolutions(name: str) -> None:
    with torch.device("meta"):
        network = make_network(name, 10)
    published, depth = VGG[name]
    *convolutions, _ = layers(network)
    assert len(convolutions) == depth - 3
    published_ones = sum(m.weight.numel() + m.out_channels for m in convolutions)  # with a bias
    assert millions(published_ones + VGG_LINEAR, 0) == str(published)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_from_8_and_any_channels(name: str) -> None:
    with torch.device("meta"):
        for channels, size in ((1, 8), (1, 28), (3, 32), (2, 33)):
            network = make_network(name, 7, channels, size)
            assert network(torch.empty(4, channels, size, size)).shape == (4, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns(name: str) -> None:
    """Also that the first logits are not large: a loss far above log(classes) is a bad start."""
    torch.manual_seed(0)
    network = make_network(name, 10, channels=1, size=8)
    loss = F.cross_entropy(network(torch.randn(16, 1, 8, 8)), torch.arange(16) % 10)
    loss.backward()
    assert loss.item() < 5
    for parameter in network.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_the_shortcut_of_resnet_is_type_a() -> None:
    """Every second pixel, and zeros for the new channels."""
    block = ResidualBlock(16, 32, stride=2)
    nn.init.zeros_(block.residual[-1].weight)  # the shortcut only
    x = torch.rand(2, 16, 9, 9)
    out = block(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2]) and not out[:, 16:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet"}, r"expected a network of small, vgg16, .*, got 'resnet'"),
        ({"classes": 1}, r"expected classes >= 2, got 1"),
        ({"channels": 0}, r"expected channels >= 1, got 0"),
        ({"size": 7}, r"expected size >= 8, got 7"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_network(**{"name": "small", "classes": 10, "channels": 3, "size": 32} | change)
