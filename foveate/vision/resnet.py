"""ResNet: the convolutional pyramid that hybrids read, with torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from foveate.vision.backbone import Backbone


class ResidualBlock(nn.Module):
    """relu(x + f(x)): two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with four times the width at the end.

    Args:
        dim: channels that come; width: of the 3 x 3 convolutions; stride: of the (first) one.
        bottleneck: the second form.

    Shape: (B, dim, H, W) -> (B, width or 4 width, H / stride, W / stride), sides rounded up.
    """

    def __init__(self, dim: int, width: int, stride: int = 1, *, bottleneck: bool = False) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        conv = lambda a, b, k, s=1: nn.Conv2d(a, b, k, s, k // 2, bias=False)  # noqa: E731
        if bottleneck:
            self.conv1, self.bn1 = conv(dim, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, out, 1), nn.BatchNorm2d(out)
        else:
            self.conv1, self.bn1 = conv(dim, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.bottleneck, self.relu = bottleneck, nn.ReLU()
        self.downsample = None
        if stride > 1 or dim != out:
            self.downsample = nn.Sequential(conv(dim, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """Deep Residual Learning for Image Recognition (2015), with the stride in the 3 x 3 convolution.

    Args:
        depths: blocks of the four stages.
        bottleneck: blocks of three convolutions.
        width: of the stem and of the first stage; later ones double it.
        num_classes, in_channels, features_only: as of every `Backbone`; drop_path must be 0.

    Shape: (B, in_channels, H, W) -> (B, num_classes), or four maps at strides 4, 8, 16 and 32, sides rounded up.

    >>> import torch
    >>> maps = ResNet((1, 1, 1, 1), width=8, features_only=True)(torch.randn(1, 3, 64, 40))
    >>> [tuple(m.shape[1:]) for m in maps]
    [(8, 16, 10), (16, 8, 5), (32, 4, 3), (64, 2, 2)]
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        bottleneck: bool = False,
        width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        if drop_path:
            raise ValueError(f"ResNet: drop_path must be 0, got {drop_path}")
        grown = 4 if bottleneck else 1
        super().__init__(
            channels=[grown * width * 2**i for i in range(4)],
            strides=(4, 8, 16, 32),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        dim = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(ResidualBlock(dim, width * 2**i, stride, bottleneck=bottleneck))
                dim = self.channels[i]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        self.make_head()

    def load_torchvision(self, state: Mapping[str, Tensor]) -> ResNet:
        """Take the weights of torchvision's model of the same layout; returns self."""
        names = {name: name.replace("fc.", "head.", 1) for name in state}
        kept = {new: state[old] for old, new in names.items() if self.head is not None or old == new}
        self.load_state_dict(kept)
        return self

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Four maps, fine to coarse."""
        self.check(images)
        x: Any = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
            maps.append(x)
        return maps


def resnet18(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> ResNet:
    """ResNet-18: 11,689,512 parameters."""
    return ResNet((2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, drop_path=drop_path,
                  features_only=features_only)  # fmt: skip


def resnet50(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> ResNet:
    """ResNet-50: 25,557,032 parameters."""
    return ResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes, in_channels=in_channels,
                  drop_path=drop_path, features_only=features_only)  # fmt: skip
