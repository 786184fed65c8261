"""What the launch files say to launchers and to processes, run by bash with the launcher's part played."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SAY = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nenv | grep ^JAX_ | sort\n'


def said(command: list[str], program: Path, folder: Path, **environment: str) -> list[str]:
    """Arguments and JAX's variables that the program gets from the command."""
    program.parent.mkdir(parents=True)
    program.write_text(SAY)
    program.chmod(0o755)
    environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_xpk_gets_a_workload_that_starts_again(tmp_path: Path):
    command = ["train.py", "configs/olmoe_1b_7b.py", "--model.moe.routing", "TopK(k=2)"]
    told = said(
        [str(LAUNCH / "xpk.sh"), "olmoe", "v6e-256", *command],
        tmp_path / "bin" / "xpk",
        tmp_path,
        CLUSTER="mine",
        IMAGE="registry/switchyard",
        STORAGE="runs",
        XPK_FLAGS="--zone=here --spot",
    )
    assert told[:2] == ["workload", "create"]
    options = dict(line.split("=", 1) for line in told[2:] if "=" in line)
    assert options["--workload"] == "olmoe"
    assert options["--tpu-type"] == "v6e-256"
    assert options["--restart-on-exit-codes"] == "75"
    assert told[-2:] == ["--zone=here", "--spot"]
    # The container's shell takes the command apart again.
    echoed = subprocess.check_output(
        ["bash", "-c", options["--command"].replace("exec python", "printf '%s\n'")]
    )
    assert echoed.decode().splitlines() == command


def test_xpk_asks_for_what_is_missing():
    ended = subprocess.run([LAUNCH / "xpk.sh", "olmoe"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: ")


@pytest.fixture
def sky() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_starts_one_process_a_machine(tmp_path: Path, sky: dict):
    told = said(
        ["bash", "-c", sky["run"]],
        tmp_path / ".venv" / "bin" / "python",
        tmp_path,
        COMMAND="train.py configs/quickstart.py --model.moe.routing 'TopK(k = 2)'",
        SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.9",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
    )
    assert told == [
        "train.py",
        "configs/quickstart.py",
        "--model.moe.routing",
        "TopK(k = 2)",
        "JAX_COORDINATOR_ADDRESS=10.0.0.5:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]
    (mounted,) = sky["volumes"]
    assert (tmp_path / "runs").readlink() == Path(mounted)


def test_launchers_start_again_what_is_unfinished(sky: dict):
    assert 75 in sky["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert re.search(r"code == 75", (LAUNCH / "slurm.sbatch").read_text())
