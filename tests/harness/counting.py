"""What a call costs, counted and not timed: operations, collectives, host syncs, gradient traffic."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradutils.upstream.dtensor import local_tensor


def events_of(function: Callable[[], Any]) -> list[Any]:
    """What torch's profiler sees of a call."""
    with profile() as profiler:
        function()
    return list(profiler.events())


def top_level(events: list[Any]) -> list[str]:
    """Operations that Python asked for, without those that they are made of."""
    operations = [event for event in events if event.name.startswith("aten::")]
    return [e.name for e in operations if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]


def top_level_calls(function: Callable[[], Any]) -> list[str]:
    return top_level(events_of(function))


def collectives(events: list[Any]) -> Counter[str]:
    """Name → how often it ran on gloo, whoever asked for it."""
    return Counter(event.name.removeprefix("gloo:") for event in events if event.name.startswith("gloo:"))


def num_host_syncs(events: list[Any]) -> int:
    """``item()``, ``bool()`` and their like; the host would wait for a device there."""
    return sum(event.name == "aten::_local_scalar_dense" for event in events)


class Traffic(TorchDispatchMode):
    """Bytes of gradients, and of copies of them, that operations read and write, over the size of this rank's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        gradients = [local_tensor(p.grad) for p in model.parameters()]
        self.storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        self.size = sum(gradient.nbytes for gradient in gradients)
        self.read = self.written = 0.0
        self._copies: list[Tensor] = []  # kept, so that nothing else is given their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        sizes = set()
        for value, schema in zip(args, func._schema.arguments, strict=False):
            for tensor in _local_tensors(value):
                if tensor.untyped_storage().data_ptr() in self.storages:
                    sizes.add(tensor.numel())
                    is_write = schema.alias_info is not None and schema.alias_info.is_write
                    self.read += tensor.nbytes / self.size
                    self.written += tensor.nbytes / self.size if is_write else 0
        for tensor in _local_tensors(result):
            if tensor.numel() > 1 and tensor.numel() in sizes and not self._is_known(tensor):
                self.storages.add(tensor.untyped_storage().data_ptr())
                self.written += tensor.nbytes / self.size
                self._copies.append(tensor)
        return result

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages


def _local_tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [local_tensor(item) for item in items if isinstance(item, Tensor)]
