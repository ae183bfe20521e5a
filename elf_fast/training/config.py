"""`TrainConfig` by the name that earlier versions documented."""

from ..runs.config import TrainConfig

__all__ = ["TrainConfig"]
