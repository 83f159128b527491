"""The sbatch script under a real Slurm on this machine, where Debian's packages for one are installed."""

import os
import re
import shutil
import socket
import subprocess
import time

import pytest
from conftest import ROOT, metrics

from launch.workers import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONFIGURATION = """
ClusterName=lockstep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=60
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory):
    """`slurm(program, …)` runs a program of a Slurm with one node and two cores, and returns what it printed."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent or os.geteuid():
        pytest.skip(f"Slurm cannot start here: {', '.join(absent) or 'this is not root'}")
    folder, daemons = tmp_path_factory.mktemp("slurm"), []
    folder.chmod(0o755)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o077 == 0 and str(parent).startswith("/tmp"):
            parent.chmod(0o755)  # munge's socket is refused below a folder that is closed
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=socket.gethostname().split(".")[0], ports=free_ports(2), folder=folder)
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\n")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    commands = [
        [
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key"),
            *(f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/seed"),
        ],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]

    def call(*command):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        return done.stdout.strip() + done.stderr.strip()

    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "w")  # noqa: SIM115 - held by the daemon
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            time.sleep(2)
        for _ in range(60):
            if "idle" in call("sinfo", "-h", "-o", "%T"):
                break
            time.sleep(1)
        else:
            logs = "".join(path.read_text()[-300:] for path in folder.glob("slurm*.log"))
            pytest.skip(f"Slurm does not start here: {call('sinfo')} {logs}")
        yield call
    finally:
        call("scancel", "--user=root", "--signal=KILL", "--full")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def wait(condition, told, seconds=300):
    """Wait until `condition()`; after `seconds` fail with what `told()` says."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def test_a_job_trains_is_told_to_stop_is_queued_again_and_completes(slurm, tmp_path, data_dir):
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("the script runs .venv, which launch/local.sh makes")
    run_dir, out = tmp_path / "run", tmp_path / "out.txt"
    flags = ["--model=mlp", "--train_steps=8000", "--batch_size=48", "--checkpoint_every=200", "--log_every=500"]
    options = ["--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={out}", "launch/slurm.sbatch"]
    job = slurm("sbatch", *options, *flags, f"--run_dir={run_dir}", f"--data_dir={data_dir}")
    assert job.isdigit(), job

    def show():
        return slurm("scontrol", "show", "job", job)

    def state():
        # Empty while the controller does not answer, which is no state of the job.
        found = re.search(r"JobState=(\w+)", show())
        return found[1] if found else ""

    def told():
        return f"{show()}\n{out.read_text() if out.exists() else ''}"

    def completed():
        # Slurm lets a queued job wait two minutes. Sooner will do, not at once: it forgets what it is told while the
        # job before still completes, and within the second of its end it fails the job: "Job credential revoked".
        if (now := state()) == "PENDING" and time.monotonic() > queued + 5:
            slurm("scontrol", "update", f"jobid={job}", "StartTime=now")
        assert now in ("", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED"), told()
        return now == "COMPLETED"

    wait(lambda: any((run_dir / "checkpoints").glob("step-*")), told)
    slurm("scancel", "--signal=TERM", job)
    wait(lambda: state() == "PENDING", told)
    queued = time.monotonic()
    text = out.read_text()
    assert "1: " in text and "(Slurm)" in text
    assert "the same command continues" in text
    wait(completed, told)
    assert "resumed from the checkpoint of step" in out.read_text()
    assert metrics(run_dir)[-1]["step"] == 8000
