"""Which heads the installed transformers has, and how one is built."""

import importlib
import inspect
import pkgutil
import re

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

MAX_PARAMETERS = 30_000_000

LOSS_ARGUMENT = re.compile(
    r"(mask_|class_|mc_)?labels|label_ids|next_sentence_label|start_positions|return_loss|(future|target)_values|"
    r"bool_masked_pos|mask_time_indices"
)
"""An argument of a forward that can make it return a loss."""


class TooLargeError(ValueError):
    """Shrinking left more than ``MAX_PARAMETERS``."""


def head_classes() -> dict[str, type[PreTrainedModel]]:
    """Class name → public class of transformers whose forward takes something to make a loss of."""
    heads: dict[str, type[PreTrainedModel]] = {}
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        for module in pkgutil.iter_modules(importlib.import_module(package.name).__path__, f"{package.name}."):
            if ".modeling_" not in module.name:
                continue
            try:
                contents = vars(importlib.import_module(module.name))
            except ImportError:
                continue  # a package that is not installed
            heads |= {
                name: thing for name, thing in contents.items() if _is_head(thing) and thing.__module__ == module.name
            }
    return dict(sorted(heads.items()))


def _is_head(thing: object) -> bool:
    if not (inspect.isclass(thing) and issubclass(thing, PreTrainedModel) and hasattr(transformers, thing.__name__)):
        return False
    name, arguments = thing.__name__, set(filter(LOSS_ARGUMENT.fullmatch, inspect.signature(thing.forward).parameters))
    # The bare encoders of image models take masks, but return no loss.
    is_encoder = name.endswith("Model") and arguments == {"bool_masked_pos"}
    return name.lower().endswith("forpretraining") or (bool(arguments) and not is_encoder)


def build(head: type[PreTrainedModel], config: PretrainedConfig) -> nn.Module:
    """The head in float32 and training mode without anything random or shared between rows in it.

    Raises:
        TooLargeError: it has more than ``MAX_PARAMETERS``.
    """
    with torch.device("meta"):
        try:
            num_parameters = sum(p.numel() for p in head(config).parameters())
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            num_parameters = 0  # not every model can be built without memory
    if num_parameters > MAX_PARAMETERS:
        raise TooLargeError(f"{num_parameters / 1e6:.0f} million parameters")
    torch.manual_seed(11)
    model = head(config).float()
    with torch.no_grad():
        for tensor in model.parameters():
            # Empty memory, or zeros that would hide a term of the loss.
            if tensor.is_floating_point() and not (tensor.isfinite().all() and tensor.any()):
                tensor.normal_(0, 0.02)
    for module in model.modules():
        _calm(module)
    return model.train()


def _calm(module: nn.Module) -> None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # In training mode it makes every row depend on the others of its micro-batch.
        module.register_forward_pre_hook(_stay_in_eval)
    for name in ("dropout", "attention_dropout", "layerdrop", "drop_prob", "dropout_prob", "attn_dropout"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)


def _stay_in_eval(module: nn.Module, _: Tensor) -> None:
    module.eval()
