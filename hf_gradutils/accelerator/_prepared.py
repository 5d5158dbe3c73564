"""Models as accelerate has prepared them."""

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_gradutils.accelerator._half_precision import HalfParameters
from hf_gradutils.sync import find_wrappers
from hf_gradutils.upstream.accelerate import models_of


class PreparedModels:
    """Wrappers and half-precision parameters per model. Cached, because finding them walks every module.

    Args:
        accelerator: Prepares the models.
        with_half_shards: Accumulate half-precision shards in float32 too, where FSDP2 can.
    """

    def __init__(self, accelerator: Accelerator, *, with_half_shards: bool):
        self._accelerator = accelerator
        self._with_half_shards = with_half_shards
        self._outermost: dict[nn.Module, nn.Module] = {}
        self._wrappers: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
        self._prepared: dict[nn.Module, nn.Module] = {}
        self._half: dict[nn.Module, HalfParameters] = {}

    def forget_wrappers(self) -> None:
        """Look for wrappers again: something is prepared, perhaps in the middle of a window."""
        self._wrappers.clear()
        self._prepared.clear()

    def forget(self) -> None:
        """Look for everything again, without gradients that are wider than their parameters."""
        self.round_gradients()
        self.forget_wrappers()
        self._half.clear()

    def release(self) -> None:
        """Hold no model any more."""
        self._outermost.clear()

    def add(self, wrapped: nn.Module) -> None:
        """Add a model with accelerate's wrappers around it."""
        self._outermost[without_wrappers(wrapped)] = wrapped

    def __getitem__(self, model: nn.Module) -> nn.Module:
        """The prepared model, for one with or without wrappers."""
        if model not in self._prepared:
            inside = without_wrappers(model)
            self._prepared[model] = next(
                (p for p in models_of(self._accelerator) if without_wrappers(p) is inside), model
            )
        return self._prepared[model]

    def outermost(self, model: nn.Module) -> nn.Module:
        """The model with accelerate's wrappers around it, for one with or without."""
        return self._outermost.get(without_wrappers(model), model)

    def wrappers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules of the wrappers around and in the model that communicate gradients."""
        if model not in self._wrappers:
            self._wrappers[model] = find_wrappers(self.outermost(model))
        return self._wrappers[model]

    def half_parameters(self, model: nn.Module) -> HalfParameters:
        """The model's half-precision parameters, whose gradients are accumulated in float32."""
        prepared = self[model]
        if prepared not in self._half:
            self._half[prepared] = HalfParameters.of(self.outermost(model), with_shards=self._with_half_shards)
        return self._half[prepared]

    def round_gradients(self, *models: nn.Module) -> None:
        """Round gradients of these models, or of all, to the dtype of their parameters."""
        for prepared, half in self._half.items():
            if not models or prepared in models:
                half.round()


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model without wrappers; ``unwrap_model`` would take DDP out of a compiled model for good."""
    inside: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inside
