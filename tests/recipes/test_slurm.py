"""The batch script on two simulated nodes: it trains, a killed rank ends the job, and the job goes on from there."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.recipe_cases import KILLING, ROOT, SMALL, environment, steps_of

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "configs" / "slurm" / "finetune.sbatch"

SRUN = """#!/bin/bash
# Stands for srun on two nodes: runs the command once for each, with the node's own variables, prefixes what it says
# with the node, and waits for both. Unlike srun it ends no launcher: they have to end by themselves.
set -u
while [ "${1:0:2}" = "--" ]; do echo "$1" >> "$STUBS/srun_options"; shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" > >(sed "s/^/$node: /") 2>&1 &
    pids[node]=$!
done
code=0
for node in 0 1; do wait "${pids[node]}"; own=$?; echo "$node $own" >> "$STUBS/exits"; [ $own = 0 ] || code=$own; done
exit $code
"""

SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nunreachable.invalid\\n'
"""


def free_job_id():
    """One whose port (20000 + its last four digits) is free; runs of the suite start at different ones."""
    for job_id in range(1000 + os.getpid() % 8000, 9999):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + job_id)):
                return job_id
    raise AssertionError("every port is taken")


def sbatch(home, stubs, *arguments, **variables):
    """Run the script as slurmd does on the first node of an allocation; its exit code, output and seconds."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(free_job_id()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "RANKS_PER_NODE": "1", "STUBS": str(stubs)}
    env = environment(home)
    path = f"{stubs}:{Path(sys.executable).parent}:{env['PATH']}"
    start_s = time.monotonic()
    job = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=env | slurm | {"PATH": path} | variables,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    return job.returncode, job.stdout, time.monotonic() - start_s


def processes_of(folder):
    """Whatever still runs with this folder on its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def test_a_killed_rank_ends_the_job_on_both_nodes_and_the_next_job_goes_on(home, tmp_path):
    output = tmp_path / "run"
    training = ["configs/causal_lm.yaml", *SMALL, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    training += ["--output_dir", output]
    (first := tmp_path / "first").mkdir()
    code, log, wall_s = sbatch(home, first, *KILLING, "1@3", "recipes/finetune.py", *training)
    assert code != 0
    assert dict(line.split() for line in (first / "exits").read_text().splitlines()).keys() == {"0", "1"}
    assert all(not line.endswith(" 0") for line in (first / "exits").read_text().splitlines()), log[-3000:]
    assert "1:   traceback : Signal 9 (SIGKILL) received by PID" in log, log[-3000:]
    assert wall_s < 100, "the launchers end by themselves, not by a time limit"
    assert processes_of(output) == []
    assert list(output.glob("checkpoint-*/trainer_state.json"))
    assert not (output / "model.safetensors").exists()

    (second := tmp_path / "second").mkdir()
    code, log, _ = sbatch(home, second, "recipes/finetune.py", *training, "--resume_from_checkpoint", "last")
    assert code == 0, log[-3000:]
    assert "2 nodes × 1 ranks, meeting at 127.0.0.1:" in log
    assert "0: causal-lm: " in log
    assert "2 × cpu" in log
    assert [step["step"] for step in steps_of(output)] == [1, 2, 3, 4]
    assert (output / "model.safetensors").exists()
    assert (second / "srun_options").read_text().split() == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--label",
    ]


def test_what_the_script_cannot_know_is_said_in_one_line(home, tmp_path):
    code, log, _ = sbatch(home, tmp_path)
    assert code == 2
    assert log.startswith("error: which recipe?")
    code, log, _ = sbatch(home, tmp_path, "recipes/finetune.py", RANKS_PER_NODE="")
    assert code != 0
    assert "no GPUs on this node; set RANKS_PER_NODE" in log
