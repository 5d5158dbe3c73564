"""Random values of the right size, and what a configuration says about it."""

from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PretrainedConfig

from benchmarks.heads.configs import IMAGE_SIZE, VOCAB

LENGTH = 12
FIRST_WORD = 64
NUM_CHOICES = 3


def setting(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of the names that the configuration, or one within it, has."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for name in names:
        try:
            value = getattr(config, name, None)
        except AttributeError:
            continue  # differs between layers
        if value is not None:
            return value
    found = (setting(part, *names) for part in inner)
    return next((value for value in found if value is not None), default)


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    size = setting(config, "image_size", "img_size", "crop_size", "input_size", default=IMAGE_SIZE)
    if isinstance(size, dict):
        size = [size.get("height", IMAGE_SIZE), size.get("width", IMAGE_SIZE)]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def words(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)


def classes(generator: Generator, num_classes: int, *shape: int) -> Tensor:
    return torch.randint(num_classes, shape, generator=generator)


def keep_some(generator: Generator, values: Tensor, rest: Any = -100, least: int = 2) -> Tensor:
    """Overwrite the tail. The square makes few targets common and many rare, so that parts of a batch differ."""
    kept = least + int((values.numel() - least + 1) * torch.rand((), generator=generator).square())
    values.view(-1)[kept:] = rest
    return values


def noise(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)
