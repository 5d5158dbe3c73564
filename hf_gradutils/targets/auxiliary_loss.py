"""The auxiliary loss of a mixture of experts, which is no mean over targets."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")
_OF_LOGITS = "router_z_loss_coef"
"""Of a second term: of SwitchTransformers' loss, not of NLLB-MoE's, which has it too."""


def auxiliary_places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(Object, attribute) of each factor with which a mixture of experts adds its auxiliary loss to the loss."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    # Heads that keep no copy read the text model's configuration, whatever the one around it says.
    for place in (model, text_config, config):
        for name in (*_FACTORS, _OF_LOGITS):
            if isinstance(getattr(place, name, None), int | float):
                yield place, name


def auxiliary_coefficient(model: nn.Module) -> float:
    """The factor with which a mixture of experts adds its auxiliary loss to the loss; 0 if there is none."""
    return next((float(getattr(place, name)) for place, name in auxiliary_places(model) if name in _FACTORS), 0.0)


@contextlib.contextmanager
def without_auxiliary(model: nn.Module) -> Iterator[None]:
    """Leave out a mixture's auxiliary loss."""
    with contextlib.ExitStack() as stack:
        for place, name in [found for module in model.modules() for found in auxiliary_places(module)]:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, 0.0)
        yield
