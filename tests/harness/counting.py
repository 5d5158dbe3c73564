"""What a call costs, counted and not timed: operations, collectives, host syncs, gradient traffic."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
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


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a tensor: ``item()``, ``bool()``, ``tolist()`` and their like."""

    READING = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "__contains__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.READING
        return func(*args, **(kwargs or {}))


class SavedBytes:
    """Bytes of the tensors that autograd keeps for backwards, without parameters: activations."""

    def __init__(self, model: nn.Module):
        self.now = self.peak = 0
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._num_kept: Counter[int] = Counter()
        """By storage, which several tensors may share."""

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """A context in which they are counted; forwards in it may be run backward in it only."""
        with saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> "_Kept":
        tensor = tensor.detach()  # an output's graph would keep itself alive
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place in self._parameters:
            return _Kept(tensor, lambda: None)
        if not self._num_kept[place]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._num_kept[place] += 1
        return _Kept(tensor, lambda: self._free(place, size))

    def _free(self, place: int, size: int) -> None:
        self._num_kept[place] -= 1
        if not self._num_kept[place]:
            self.now -= size


class _Kept:
    def __init__(self, tensor: Tensor, free: Callable[[], None]):
        self.tensor, self._free = tensor, free

    def __del__(self) -> None:
        self._free()


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
