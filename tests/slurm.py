"""A real Slurm of two nodes on this machine, for tests: its daemons run as this user, on free
ports, with all their files in one folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has the daemons
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel")
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, "other")  # the processes of a run find each other by the name of its first node
# No cgroups and no accounting; a job is scheduled, signalled and killed as soon as Slurm can. A
# task's end is the others' by default. The second node is for jobs that make way for urgent ones.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
KillOnBadExit=1
WaitTime=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes={nodes[0]} Default=YES
PartitionName=spare Nodes={nodes[1]} PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes={nodes[1]} PriorityTier=2
"""


def missing() -> str:
    """Which of Slurm's programs are not here."""
    return ", ".join(program for program in PROGRAMS if shutil.which(program, path=PATH) is None)


class Slurm:
    """The running cluster; `environment` is what its commands need."""

    def __init__(self, dir: Path) -> None:
        self.dir, self.environment = (
            dir,
            {**os.environ, "PATH": PATH, "SLURM_CONF": f"{dir}/slurm.conf"},
        )
        for folder in (dir, dir / "state", *(dir / f"spool.{node}" for node in NODES)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        (dir / "munge.key").write_bytes(os.urandom(128))
        (dir / "munge.key").chmod(0o600)
        filled = CONFIG.format(
            dir=dir, host=HOST, user=getpass.getuser(), nodes=NODES, ports=free_ports(3)
        )
        (dir / "slurm.conf").write_text(filled)
        (dir / "cgroup.conf").write_text("CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n")
        self.call(
            "munged",
            f"--key-file={dir}/munge.key",
            f"--socket={dir}/munge.socket",
            f"--pid-file={dir}/munged.pid",
            f"--log-file={dir}/munged.log",
            f"--seed-file={dir}/munged.seed",
        )
        self.call("slurmctld", "-c")
        for node in NODES:
            self.call("slurmd", "-N", node)
        self.until(
            lambda: (
                set(
                    self.call(
                        "sinfo", "--noheader", "--states=idle", "--Node", "--format=%N"
                    ).split()
                )
                == {*NODES}
            ),
            20,
        )

    def call(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        return done.stdout

    def queued(self) -> dict[str, str]:
        """The jobs that Slurm has not done with, and their states."""
        return dict(
            line.split()
            for line in self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        )

    def until(self, condition: Callable[[], Any], seconds: float) -> None:
        """Waits until the condition holds. Jobs that were put back start meanwhile: Slurm has them
        wait for two minutes. One that starts in the second in which it was put back is taken for
        the one before, and lost."""
        end, pending = time.monotonic() + seconds, dict[str, float]()
        while not condition():
            queued, now = self.queued(), time.monotonic()
            assert now < end, queued
            pending = {
                job: pending.get(job, now) for job, state in queued.items() if state == "PENDING"
            }
            for job in (job for job, since in pending.items() if now - since > 2):
                subprocess.run(
                    ["scontrol", "update", f"jobid={job}", "StartTime=now"],
                    env=self.environment,
                    capture_output=True,
                )
            time.sleep(0.2)

    def close(self) -> None:
        """Ends every job, then the daemons."""
        self.call("scancel", f"--user={getpass.getuser()}")
        self.until(lambda: not self.queued(), 30)
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            process = int((self.dir / f"{name}.pid").read_text())
            os.kill(process, signal.SIGTERM)
            end = time.monotonic() + 10
            while Path(f"/proc/{process}").exists():
                if time.monotonic() > end:
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Ports that nobody uses."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
