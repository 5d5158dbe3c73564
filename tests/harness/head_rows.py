"""Rows for each head, and a count of what its loss is a mean over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

Row = dict[str, Tensor]

LENGTH = 12
VOCAB = 48
NUM_CLASSES = 3
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = range(8)
IMAGE_SIZE, PATCH_SIZE = 16, 4
NUM_MELS = 8


def collate(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def each(make_row: Callable[[Generator], Row]) -> Callable[[int, int], list[Row]]:
    def rows(num_samples: int, seed: int) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        return [make_row(generator) for _ in range(num_samples)]

    return rows


def _words(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)


def _classes(generator: Generator, *shape: int, num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.randint(num_classes, shape, generator=generator)


def _keep_some(generator: Generator, values: Tensor, rest: Any = -100, least: int = 1) -> Tensor:
    """Overwrite the tail. The square makes few targets common and many rare, so that parts of a batch differ."""
    most = values.numel() - least + 1
    kept = least + int(most * torch.rand((), generator=generator).square())
    values.view(-1)[kept:] = rest
    return values


def text(generator: Generator, *shape: int) -> Row:
    shape = (*shape, LENGTH)
    return {"input_ids": _words(generator, *shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}


def _text_with_words(generator: Generator, least: int = 1) -> Row:
    """The first label is always there: a head that shifts has no use for it, so that counting it shows."""
    return text(generator) | {"labels": _keep_some(generator, _words(generator, LENGTH), least=least)}


def plain_text(generator: Generator, least: int = 1) -> Row:
    row = _text_with_words(generator, least)
    return {name: row[name] for name in ("input_ids", "labels")}


def illustrated_text(generator: Generator) -> Row:
    """An image of 4 to 24 patches; each 2 × 2 of them takes the place of one word."""
    row = _text_with_words(generator, least=2)
    height, width = (2 * int(torch.randint(1, most + 1, (), generator=generator)) for most in (3, 2))
    is_image = torch.zeros(LENGTH, dtype=torch.int64)
    is_image[1 : 1 + height * width // 4] = 1
    row["input_ids"][is_image == 1] = IMAGE
    row["input_ids"][0] = VISION_START
    return row | {
        "mm_token_type_ids": is_image,
        "pixel_values": torch.randn(height * width, 3 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def collate_illustrated(rows: list[Row]) -> Row:
    """The patches of all images in one list, as the model's processor has them."""
    concatenated = ("pixel_values", "image_grid_thw")
    batch = collate([{name: value for name, value in row.items() if name not in concatenated} for row in rows])
    return batch | {name: torch.cat([row[name] for row in rows]) for name in concatenated}


def text_with_classes(generator: Generator) -> Row:
    return text(generator) | {"labels": _keep_some(generator, _classes(generator, LENGTH))}


def text_with_answer(generator: Generator) -> Row:
    ends = {f"{end}_positions": _classes(generator, num_classes=LENGTH) for end in ("start", "end")}
    return text(generator) | ends


def text_with_flags(generator: Generator) -> Row:
    return text(generator) | {"labels": _classes(generator, NUM_CLASSES, num_classes=2).float()}


def replaced_words(generator: Generator) -> Row:
    row = text(generator) | {"labels": _classes(generator, LENGTH, num_classes=2)}
    return row | {"attention_mask": _keep_some(generator, row["attention_mask"], rest=0)}


def image(generator: Generator) -> Row:
    contrast = 0.2 + 2 * torch.rand((), generator=generator)
    return {"pixel_values": contrast * torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}


def masked_image(generator: Generator) -> Row:
    masked = torch.ones((IMAGE_SIZE // PATCH_SIZE) ** 2, dtype=torch.bool)
    return image(generator) | {"bool_masked_pos": _keep_some(generator, masked, rest=False)}


def _image_with_pixels(generator: Generator) -> Row:
    pixels = _classes(generator, IMAGE_SIZE, IMAGE_SIZE)
    return image(generator) | {"labels": _keep_some(generator, pixels, rest=255)}


def sound(generator: Generator) -> Row:
    return {"input_values": torch.randn(55, generator=generator)}  # 13 frames: six labels and blanks between them


def spectrogram_with_words(generator: Generator) -> Row:
    labels = _keep_some(generator, _words(generator, LENGTH))
    return {"input_features": torch.randn(NUM_MELS, 2 * LENGTH, generator=generator), "labels": labels}


def rows_with_class(make_row: Callable[[Generator], Row], num_classes: int = NUM_CLASSES) -> Any:
    return each(lambda g: make_row(g) | {"labels": _classes(g, num_classes=num_classes)})


rows_with_words = each(_text_with_words)
shifting_rows = each(lambda g: _text_with_words(g, least=2))
rows_with_number = each(lambda g: text(g) | {"labels": torch.randn((), generator=g)})
rows_with_pixels = each(_image_with_pixels)
rows_of_speech = each(lambda g: sound(g) | {"labels": _keep_some(g, _words(g, 6))})


# ---- What a loss is a mean over ----


def count_rows(batch: Row) -> int:
    return len(next(iter(batch.values())))


def count_labels(batch: Row, ignored: int = -100) -> int:
    return int((batch["labels"] != ignored).sum())


def count_shifted(batch: Row) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def count_pixels(batch: Row) -> int:
    return count_labels(batch, ignored=255)
