"""An exit's classifier."""

from __future__ import annotations

from torch import Tensor, fx, nn

__all__ = ["ExitHead", "pool"]


def pool(features: Tensor) -> Tensor:
    """[N, D] from features [N, D, H, W] (mean over positions), tokens [N, T, D] (mean over
    tokens) or [N, D] (as it is)."""
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


# torch.fx records calls of it whole, because it cannot record a decision on a shape.
fx.wrap("pool")


class ExitHead(nn.Module):
    """An exit's classifier: global average pool (or token mean), then linear.

    Args:
        in_features: D, channels of the features [N, D, H, W], tokens [N, T, D] or vectors [N, D].
        num_classes: C.
        conv: put a 3x3 stride-2 convolution, BatchNorm and ReLU in front ([N, D, H, W] only). With
            it, the stage before need not separate the classes itself and can keep features for
            later stages.

    Shape: features -> logits [N, C].
    """

    def __init__(self, in_features: int, num_classes: int, *, conv: bool = False) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.stem: nn.Module = nn.Identity()
        if conv:
            self.stem = nn.Sequential(
                nn.Conv2d(in_features, in_features, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(in_features),
                nn.ReLU(),
            )
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(pool(self.stem(features)))
