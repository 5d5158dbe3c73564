import torch.distributed as dist
from ranks import ranks


@ranks(4, dp=2, tp=2)
def test_each_rank_has_its_place(mesh):
    assert mesh.get_coordinate() == [dist.get_rank() // 2, dist.get_rank() % 2]


@ranks(4)
def test_warm():
    pass


@ranks(2, agent=False)
def test_no_agent():
    pass


@ranks(2)
def test_fails():
    assert dist.get_rank() * 2 == 0
    dist.barrier()
