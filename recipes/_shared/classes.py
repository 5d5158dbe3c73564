"""The classes of a classifier and their order: that of the model's head, of the data set, or of their frequency."""

import os
from collections import Counter

import datasets
from transformers import AutoConfig

from _shared.arguments import RecipeArguments
from _shared.counts import plural
from _shared.errors import UserError
from _shared.files import Texts
from _shared.lines import ROW
from _shared.rows import class_of, read, user_errors


def find_classes(recipe: RecipeArguments, train: Texts) -> list[str]:
    """List the classes of the label column; the place of a class in the list is its index in the head.

    The order is that of a fine-tuned model's head if it covers them, that of a ``ClassLabel``, that of the integers if
    they are 0, 1, 2, …, and otherwise the most frequent class first.
    """
    if recipe.task != "sequence-classification":
        return []
    column, values = recipe.label_column, Counter()
    names = names_of(train.rows, column)
    with user_errors(train.source):
        for label, row in zip(train.rows[column][:], train.rows[ROW][:], strict=True):
            values[read({column: label, ROW: row}, column, lambda value: class_of(value, names))] += 1
    del values[""]
    found = [value for value, _ in values.most_common(recipe.max_labels)]
    if len(found) < 2:
        raise UserError(
            f"{train.source.name}, column {column!r}: a classifier needs two classes or more, "
            f"the {plural(len(train.rows), 'training row')} {'has' if len(train.rows) == 1 else 'have'} "
            f"{f'only {found[0]!r}' if found else 'none'}"
        )
    integers = [str(i) for i in range(len(found))]
    own = [name for name in names or integers if recipe.max_labels is None or name in found]
    classes = own if set(found) <= set(own) else found
    return in_order_of_head(recipe, classes) if recipe.model_name_or_path else classes


def names_of(rows: datasets.Dataset, column: str) -> list[str] | None:
    feature = rows.features[column]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def in_order_of_head(recipe: RecipeArguments, classes: list[str]) -> list[str]:
    """Return the classes of a fine-tuned model in its order; raises UserError if its head does not fit."""
    try:
        config = AutoConfig.from_pretrained(recipe.model_name_or_path)
    except (OSError, ValueError, KeyError):  # load_model says what is wrong
        return classes
    if not any("ForSequenceClassification" in name for name in config.architectures or []):
        return classes  # a new head
    head = [str(config.id2label[i]) for i in range(config.num_labels)]
    if set(classes) <= set(head):
        if os.environ.get("RANK", "0") == "0" and classes != head:
            print(f"classes in the order of the head of {recipe.model_name_or_path}: {shorten(head)}", flush=True)
        return head
    is_unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(head))
    is_by_index = classes == [str(i) for i in range(len(classes))] and len(classes) <= len(head)
    if is_by_index or (is_unnamed and len(classes) == len(head)):
        return classes if len(classes) == len(head) else [str(i) for i in range(len(head))]
    raise UserError(
        f"the head of {recipe.model_name_or_path!r} has {len(head):,} classes ({shorten(head)}), and column "
        f"{recipe.label_column!r} has {len(classes):,} ({shorten(classes)}); rename the classes, or train a model "
        "without a head"
    )


def shorten(names: list[str], num_shown: int = 6, num_chars: int = 30) -> str:
    """Name the first classes.

    Example:
        >>> shorten(["spam", "ham"]), shorten(["spam", "ham", "eggs"], 2)
        ("'spam', 'ham'", "'spam', 'ham', …")
    """
    shown = [repr(name if len(name) <= num_chars else name[: num_chars - 1] + "…") for name in names[:num_shown]]
    return ", ".join(shown + ["…"] * (len(names) > num_shown))
