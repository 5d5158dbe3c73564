"""Embeddings that share their weight become one module, so that FSDP2 shards the weight in one group.

T5, BART and their kin hold one embedding as ``shared``, in the encoder and in the decoder. accelerate 1.15 makes a
group of the first and leaves the others to the root, and torch 2.13 refuses a parameter of two groups.
"""

from typing import Any

from torch import Tensor, nn


def merge_tied_embeddings(model: nn.Module) -> None:
    """Put one module where embeddings of one kind hold the same weight, unless somebody has hooked one of them.

    Names and values of parameters stay as they are, also in a state dict.
    """
    kept: dict[tuple[Tensor, type], nn.Embedding] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Embedding):
                first = kept.setdefault((child.weight, type(child)), child)
                if _settings(first) == _settings(child) and not (_is_hooked(first) or _is_hooked(child)):
                    setattr(module, name, first)


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module is told beside its weights: a scale, which word is padding."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return own | {"buffers": {name: buffer.tolist() for name, buffer in module.named_buffers()}}


def _is_hooked(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
