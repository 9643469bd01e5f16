# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of two machines with two make-believe GPUs each, all of it processes on this machine's loopback."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={0}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
GresTypes=gpu
NodeName=one NodeAddr=127.0.0.1 Port={1} CPUs=4 CoresPerSocket=4 RealMemory=1000 Gres=gpu:2
NodeName=two NodeAddr=127.0.0.1 Port={2} CPUs=4 CoresPerSocket=4 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def problem() -> str | None:
    """Why there can't be a cluster here."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed: apt-get install slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "only root can run Slurm's daemons for all users"


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """Commands to a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints, on either stream; AssertionError if it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | variables, text=True, timeout=60, capture_output=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", number).split() if "=" in word)

    def wait_for(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Runs the daemons; AssertionError with their logs if the machines don't become idle."""
    (folder / "slurm.conf").write_text(CONFIG.format(*free_ports(3), folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\nName=gpu File=/dev/null\n")
    for name in ("state", "one", "two"):
        (folder / name).mkdir()
    slurm = Cluster(folder)
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "one"], ["slurmd", "-D", "-N", "two"]):
            daemons.append(
                subprocess.Popen(command, env=slurm.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        deadline = time.monotonic() + 30
        while True:
            asked = subprocess.run(
                ["sinfo", "-hN", "-o", "%t"], env=slurm.environment, text=True, timeout=60, capture_output=True
            )
            if asked.stdout.split() == ["idle", "idle"]:
                break
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline and all(d.poll() is None for d in daemons), logs
            time.sleep(0.2)
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
