"""Two jobs that were given one MASTER_ADDR and MASTER_PORT: the second is told, the first goes on."""

import os

import pytest
import torch.distributed as dist

from hf_gradutils import FirstRankPerNode
from hf_gradutils.coordination.store import open_channel
from hf_gradutils.errors import LauncherError
from tests.harness.first_rank_cases import rank, wait_for
from tests.harness.ranks import run_ranks

SLURM = {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "{rank}", "SLURM_NODEID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}"}
BY_HAND = {"RANK": "{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": "{rank}"}


def launched_as(number: int, variables: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        os.environ.pop(name, None)
    os.environ.update({name: value.format(rank=number) for name, value in variables.items()})


TWO_JOBS = {
    "two SLURM jobs": (BY_HAND | {"SLURM_JOB_ID": "100"}, BY_HAND | {"SLURM_JOB_ID": "200"}),
    "two steps": (SLURM | {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "100"}, SLURM | {"SLURM_STEP_ID": "200"}),
    "two mpiruns": (OPEN_MPI | {"PMIX_NAMESPACE": "a-100"}, OPEN_MPI | {"PMIX_NAMESPACE": "a-200"}),
    "an array": (
        BY_HAND | {"LSB_JOBID": "7", "LSB_JOBINDEX": "100"},
        BY_HAND | {"LSB_JOBID": "7", "LSB_JOBINDEX": "200"},
    ),
    "no ids, two sizes": (BY_HAND, BY_HAND | {"WORLD_SIZE": "200"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_JOBS)
def test_a_rank_of_another_job_is_told_whose_store_it_is(case, tmp_path):
    first_0, first_1, second_1, second_0 = run_ranks(_two_jobs, 4, tmp_path, *TWO_JOBS[case], init=False, agent=False)
    assert (first_0, first_1) == ("went well", "went well")
    assert "200" in second_1
    assert "100" in second_1 or case == "no ids, two sizes"
    assert "belongs to another job" in second_1
    assert "at 127.0.0.1:" in second_1
    way_in = "" if case == "no ids, two sizes" else "; if both are to be one, call torch.distributed.init_process_group"
    assert f"choose another MASTER_PORT for one of them{way_in}" in second_1
    assert "is taken on this host, perhaps by another job; choose another MASTER_PORT" in second_0
    assert "\n" not in second_0 + second_1


def _two_jobs(folder, first, second):
    """Processes 0 and 1 are the first job's ranks; 2 and 3 are ranks 1 and 0 of the second."""
    number = rank()
    launched_as(number if number < 2 else 3 - number, first if number < 2 else second)
    told = [folder / f"told-{other}" for other in (2, 3)]
    if number < 2:
        open_channel()
        (folder / f"open-{number}").touch()
        wait_for(told)
        with FirstRankPerNode():
            pass
        return "went well"
    wait_for([folder / "open-0", folder / "open-1"])
    try:
        open_channel(timeout_s=10)
    except LauncherError as error:
        return str(error)
    finally:
        told[number - 2].touch()
    return "joined"


ONE_JOB = {
    "a container without the variables": ({"SLURM_JOB_ID": "1"}, {}),
    "other kinds": ({"SLURM_JOB_ID": "1"}, {"PBS_JOBID": "2"}),
    "heterogeneous": ({"SLURM_JOB_ID": "1", "SLURM_HET_JOB_ID": "1"}, {"SLURM_JOB_ID": "2", "SLURM_HET_JOB_ID": "1"}),
    "a step for each rank": ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "1"}),
    "an mpirun for each rank": ({"PMIX_NAMESPACE": "a"}, {"PMIX_NAMESPACE": "b"}),
}


@pytest.mark.parametrize("case", ONE_JOB)
def test_ranks_of_one_job_are_not_refused(case):
    assert run_ranks(_one_job, 2, ONE_JOB[case], init=False, agent=False) == [True, False]


def test_ranks_of_two_jobs_that_make_one_process_group_are_one_job():
    assert run_ranks(_one_group, 2, TWO_JOBS["two SLURM jobs"], init=False, agent=False) == [True, False]


def _one_group(variables):
    launched_as(rank(), variables[rank()])
    dist.init_process_group("gloo")
    with FirstRankPerNode() as is_first:
        return is_first


def _one_job(variables):
    launched_as(rank(), BY_HAND | variables[rank()])
    with FirstRankPerNode() as is_first:
        return is_first
