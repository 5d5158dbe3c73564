"""A tiny model in every parallel layout, and the one-process float64 truth beside it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

LAYOUTS: dict[str, dict[str, int]] = {
    "alone": {},
    "ddp2": {"dp": 2},
    "ddp4": {"dp": 4},
    "fsdp2": {"dp": 2},
    "fsdp4": {"dp": 4},
    "hsdp2x2": {"rep": 2, "dp": 2},
    "tp2": {"tp": 2},
    "tp2_fsdp2": {"dp": 2, "tp": 2},
    "plain_beside_fsdp2": {"dp": 2},
    "two_meshes": {"dp": 2, "tp": 2},
}
"""Name → mesh dims. Data-parallel ranks see different rows, tensor-parallel ones the same."""


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


def norm_of(gradients: dict[str, Tensor], p: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in gradients.values()]), p))


def make_mesh(layout: str, device_type: str = "cpu") -> DeviceMesh | None:
    dims = LAYOUTS[layout]
    return init_device_mesh(device_type, tuple(dims.values()), mesh_dim_names=tuple(dims)) if dims else None


def parallelize(model: TinyNet, layout: str, mesh: DeviceMesh | None) -> nn.Module:
    """The model in a layout. Asserts that the layout is what it is called."""
    if mesh is None:
        return model
    if layout.startswith("ddp"):
        return DistributedDataParallel(model)
    if "tp" in mesh.mesh_dim_names:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        assert isinstance(model.up.weight, DTensor)
        assert model.up.weight.placements == (Shard(0),)
    if layout == "two_meshes":  # FSDP over dp for some, tensor parallelism over tp for others, the rest plain
        fully_shard(model.inp, mesh=mesh["dp"])
        fully_shard(model.out, mesh=mesh["dp"])
        return model
    if layout == "plain_beside_fsdp2":
        fully_shard(model.up, mesh=mesh)
        fully_shard(model.down, mesh=mesh)
        return model
    if layout != "tp2":
        fsdp_mesh = mesh["dp"] if layout == "tp2_fsdp2" else mesh
        for child in (model.inp, model.out, model):
            fully_shard(child, mesh=fsdp_mesh)
        assert isinstance(model, FSDPModule)
        assert all(isinstance(p, DTensor) for p in model.parameters())
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
    if layout not in ("plain_beside_fsdp2", "two_meshes"):
        return
    for name, p in model.named_parameters():
        is_sharded_by_fsdp = name.split(".")[0] in (("inp", "out") if layout == "two_meshes" else ("up", "down"))
        if p.grad is not None and not is_sharded_by_fsdp:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            dist.all_reduce(grad, op=dist.ReduceOp.SUM, group=mesh["dp"].get_group())
            grad /= mesh["dp"].size()


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name → whole gradient, as a plain float64 tensor on the CPU."""
    result = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        result[name.removeprefix("module.")] = grad.detach().to("cpu", torch.float64)
    return result


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert set(got) == set(want)
    difference = sum(float((got[k] - want[k].double()).square().sum()) for k in want)
    return (difference / sum(float(w.double().square().sum()) for w in want.values())) ** 0.5
