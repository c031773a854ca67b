"""A private SLURM on this machine's loopback, for tests: one node, fake GPUs, its own key, ports and directories.

What is fake: the processors and the memory of the node, the GPUs (private copies of /dev/null, as slurmd insists on
character devices), and ``sacct``, which without a database fails: a stand-in asks squeue, which remembers finished jobs
for a day here. What is real: slurmctld, slurmd, scheduling, arrays, signals, preemption, time limits, requeue.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGES = "slurmctld slurmd slurm-client munge"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
WHY_NOT = (
    f"needs apt-get install -y --no-install-recommends {PACKAGES}"
    if not all(shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") for name in NEEDED)
    else "needs root, which alone may start the daemons and make the fake GPUs"
    if os.geteuid()
    else ""
)

WAIT_S = 900
"""For what must come about, however busy the machine; a test that works waits for none of it in full."""

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=20
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=200
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
JobRequeue=1
KillWait=30
MaxArraySize=1000
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs=8 RealMemory=8000 Gres=gpu:fake:2 State=UNKNOWN
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port}
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=pair Nodes={host},{second} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""

# Whatever columns are asked for, it answers with these: readers go by the header.
SACCT = r"""#!/bin/sh
ids= asked=$*
while [ $# -gt 0 ]; do
  case $1 in -j | --jobs) shift; ids=$ids,$1 ;; --jobs=*) ids=$ids,${1#*=} ;; esac
  shift
done
{ echo 'JobID|State|NodeList|ExitCode|DerivedExitCode'
squeue --noheader --array --states=all \
  --Format='JobArrayID:64|,State:64|,NodeList:64|,exit_code:64|,DerivedEC:64' | sed 's/ *|/|/g' |
  awk -F'|' -v OFS='|' -v ids="$ids," '
    function status(code) { return int(code / 256) ":" code % 128 }
    { split($1, p, "_") }
    index(ids, "," $1 ",") || index(ids, "," p[1] ",") { print $1, $2, $3, status($4), status($5) }'
} | case $asked in *ExitCode*) cut -d'|' -f1,2,4,5 ;; *) cat ;; esac
"""


@dataclass
class Cluster:
    """A node with 8 processors and 2 GPUs, partitions ``main`` and ``high``; jobs of ``high`` preempt ``main``'s.

    The partition ``pair`` has it and a second one.
    """

    root: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self):
        self.host = socket.gethostname().split(".")[0]
        self.second = "zz-second"  # after the host's name, which alone can be looked up
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        path = f"{self.root}/bin:/usr/sbin:/sbin:{os.environ['PATH']}"
        self.environment = inherited | {"SLURM_CONF": f"{self.root}/slurm.conf", "PATH": path}

    def start(self):
        for name in ("bin", "state", f"spool.{self.host}", f"spool.{self.second}", "munge"):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {name: free_port() for name in ("controller_port", "node_port", "second_port")}
        names |= {"host": self.host, "second": self.second, "root": self.root}
        (self.root / "slurm.conf").write_text(CONF.format(**names))
        with (self.root / "gres.conf").open("w") as file:
            for i in range(2):
                device = self.root / f"gpu{i}"
                os.mknod(device, 0o20666, os.makedev(1, 3))
                file.write(f"NodeName={self.host},{self.second} Name=gpu Type=fake File={device}\n")
        (self.root / "bin" / "sacct").write_text(SACCT)
        (self.root / "bin" / "sacct").chmod(0o755)
        munge = [f"--{name}-file={self.root}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        # Forced, as a parent directory may be writable for all, which munged takes for unsafe.
        self.call("munged", "--force", "--num-threads=2", f"--socket={self.root}/munge/socket", *munge)
        self.call("slurmctld", "-f", f"{self.root}/slurm.conf")
        self.start_node()
        self.call("slurmd", "-N", self.second, "-f", f"{self.root}/slurm.conf")

    def stop(self):
        if (self.root / "slurmctld.pid").exists():
            self.call("scancel", "--user=root", check=False)
            wait_for(lambda: not self.call("squeue", "-h", check=False), 20, "jobs to end", strict=False)
        for name in (f"slurmd.{self.second}.pid", f"slurmd.{self.host}.pid", "slurmctld.pid", "munge/pid"):
            self._end(self.root / name, signal.SIGTERM)

    def start_node(self):
        self.call("slurmd", "-N", self.host, "-f", f"{self.root}/slurm.conf")
        states = ("idle", "mixed", "allocated", "completing")
        wait_for(lambda: self.call("sinfo", "-h", "-p", "main", "-o", "%T").rstrip("*") in states, what=self._logs)

    def stop_node(self):
        """Kill slurmd as when its machine fails; what runs under it goes on, as when only the network fails."""
        self._end(self.root / f"slurmd.{self.host}.pid", signal.SIGKILL)

    @contextlib.contextmanager
    def configured(self, line, instead):
        """The cluster with another line in the place of one of its configuration."""
        conf = self.root / "slurm.conf"
        before = conf.read_text()
        assert f"\n{line}\n" in before
        conf.write_text(before.replace(f"\n{line}\n", f"\n{instead}\n"))
        self._restart_controller()
        try:
            yield
        finally:
            conf.write_text(before)
            self._restart_controller()

    def _restart_controller(self):
        """Some settings, such as MaxArraySize, are read at a start alone; jobs survive it."""
        self._end(self.root / "slurmctld.pid", signal.SIGTERM)
        self.call("slurmctld", "-f", f"{self.root}/slurm.conf")
        self.call("scontrol", "reconfigure")

    def call(self, *command, check=True):
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script, *options):
        """Run a shell command as a job; returns its id."""
        return self.call("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")

    def state(self, job):
        return self.call("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T", check=False)

    def wait_for_state(self, job, *states, timeout=WAIT_S):
        return wait_for(lambda: (state := self.state(job)) in states and state, timeout, lambda: f"{job} {states}")

    def _end(self, pid_file, number):
        try:
            pid = int(pid_file.read_text())
            os.kill(pid, number)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return
        wait_for(lambda: not alive(pid), what=lambda: f"{pid_file.name} to end")
        pid_file.unlink(missing_ok=True)

    def _logs(self):
        tails = [path.read_text()[-1500:] for path in sorted(self.root.glob("slurm*.log"))]
        return "\n".join([self.call("sinfo", check=False), *tails])


def alive(pid):
    """Whether a process runs; a zombie, which nobody here need reap, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, timeout=WAIT_S, what="", *, strict=True):
    """The first true value of ``condition()``, asked again and again."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            assert not strict, f"waited {timeout} s for {what() if callable(what) else what}"
            return value
        time.sleep(0.1)
    return value


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running private SLURM."""
    if WHY_NOT:
        pytest.skip(f"a private SLURM {WHY_NOT}")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
