"""What a Trainer books for each micro-batch: tokens and operations. Padding is none of either."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer

from hf_gradutils.upstream.deepspeed import is_partitioned


class Operations:
    """Floating-point operations of micro-batches, with the parameters counted once in a training."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._per_token: int | None = None

    def of(self, inputs: Any, floating_point_ops: Callable[..., int]) -> int:
        """Operations of a micro-batch, as ``floating_point_ops`` has them: the Trainer's, or a subclass's."""
        model = self._trainer.model
        name = getattr(model, "main_input_name", "input_ids")
        name = name if isinstance(name, str) else name[0]  # OneFormer has two, which Trainer's own count fails for
        main_input = inputs.get(name) if isinstance(inputs, Mapping) else None
        is_trainers = getattr(floating_point_ops, "__func__", None) is Trainer.floating_point_ops
        if not (is_trainers and isinstance(main_input, Tensor) and hasattr(model, "num_parameters")):
            return int(floating_point_ops(inputs))
        if is_partitioned(next(model.parameters(), main_input)):  # ZeRO-3 may gather some later
            return int(floating_point_ops(inputs))
        if self._per_token is None:
            self._per_token = 6 * model.num_parameters(exclude_embeddings=True)
        return main_input.numel() * self._per_token


def without_rows(inputs: Any) -> Any:
    """The same entries without rows, which count for nothing."""
    if not isinstance(inputs, Mapping):
        return inputs
    return {name: value[:0] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()}
