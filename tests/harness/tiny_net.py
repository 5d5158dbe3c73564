"""A tiny model, spread over ranks by hand, and the float64 truth of one process beside it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.harness.layouts import LAYOUTS


class TinyNet(nn.Module):
    """Shapes that shard unevenly: 7 rows over 2 ranks, 3 rows over 4 (one shard is empty)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 7)
        self.up = nn.Linear(7, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        x = self.norm(self.down(torch.tanh(self.up(x))))
        return self.out(x)


def make_net(dtype: torch.dtype = torch.float64) -> TinyNet:
    torch.manual_seed(7)
    return TinyNet().to(dtype)


def make_batch(num_rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and a mask of targets: ragged counts per row, one row without any."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_rows, 3, generator=generator) < 0.6
    mask[1] = False
    return x, y, mask


def summed_loss(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Sum over targets; the mean is this divided by ``mask.sum()``."""
    error = (model(x.to(next(model.parameters()).dtype)) - y).pow(2)
    return (error * mask).sum()


def true_mean_gradient(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradient of the mean over all targets of the batch: one process, one batch, float64."""
    model = make_net(dtype).double()
    x, y, mask = make_batch()
    (summed_loss(model, x, y, mask) / mask.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def make_mesh(layout: str, device_type: str = "cpu") -> DeviceMesh | None:
    dims = LAYOUTS[layout].axes
    return init_device_mesh(device_type, tuple(dims.values()), mesh_dim_names=tuple(dims)) if dims else None


def parallelize(model: TinyNet, layout: str, mesh: DeviceMesh | None) -> nn.Module:
    """The model in a layout. Asserts that the layout is what it is called."""
    model = _parallelize(model, layout, mesh)
    assert LAYOUTS[layout].is_right(model), layout
    return model


def _parallelize(model: TinyNet, layout: str, mesh: DeviceMesh | None) -> nn.Module:
    if mesh is None:
        return model
    if layout.startswith("ddp"):
        return DistributedDataParallel(model)
    if "tp" in mesh.mesh_dim_names:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        assert model.up.weight.placements == (Shard(0),)
    parts = {
        "tp2": (),
        "two_meshes2x2": (model.inp, model.out),  # over dp; tensor parallelism over tp for others, the rest plain
        "plain_beside_fsdp2x2": (model.up, model.down),
    }
    for part in parts.get(layout, (model.inp, model.out, model)):
        fully_shard(part, mesh=mesh["dp"] if "tp" in mesh.mesh_dim_names else mesh)
    return model


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(this rank's place among the data ranks, how many there are)."""
    if mesh is None:
        return 0, 1
    index, size = 0, 1
    for dim, name in enumerate(mesh.mesh_dim_names):
        if name != "tp":
            index = index * mesh.size(dim) + mesh.get_local_rank(name)
            size *= mesh.size(dim)
    return index, size


def data_group(layout: str, mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The data ranks as one group; None for the default group, which is right wherever they are all there are."""
    return (
        mesh["dp"].get_group()
        if mesh is not None and "tp" in mesh.mesh_dim_names and "dp" in mesh.mesh_dim_names
        else None
    )


def sync_plain_gradients(model: nn.Module, layout: str, mesh: DeviceMesh | None) -> None:
    """Average what no wrapper averages: plain parameters beside sharded ones, DTensors outside of FSDP."""
    if layout not in ("plain_beside_fsdp2x2", "two_meshes2x2"):
        return
    for name, p in model.named_parameters():
        is_sharded_by_fsdp = name.split(".")[0] in (("inp", "out") if layout == "two_meshes2x2" else ("up", "down"))
        if p.grad is not None and not is_sharded_by_fsdp:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            dist.all_reduce(grad, op=dist.ReduceOp.SUM, group=mesh["dp"].get_group())
            grad /= mesh["dp"].size()
