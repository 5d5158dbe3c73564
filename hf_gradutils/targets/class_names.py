"""Tables of model classes by name, looked up along the class hierarchy.

So are subclasses found, and the classes that ``fully_shard`` derives, without an import of the module of the class.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def class_names(model: nn.Module) -> list[str]:
    """The names of a model's class and of those it derives from, in their order; the model without wrappers."""
    return [base.__name__ for base in type(model).__mro__]


def look_up(table: Mapping[str, T], model: nn.Module) -> T | None:
    """The entry of a model's class, or of the first in its hierarchy that has one."""
    return next((table[name] for name in class_names(model) if name in table), None)
