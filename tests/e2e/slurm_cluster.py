"""A SLURM cluster of two nodes on this machine, from Debian's packages slurm-wlm and munge. Needs root.

All of it is private: configuration, keys, spool and logs lie in one folder, and the daemons in namespaces of their own
(processes, network, host names, mounts). So no port is taken from anybody, nothing outside of the folder is changed,
and with the first process everything ends, daemons and jobs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.launchers import ROOT, environment

NODES = ("n1", "n2")
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
UNSHARE = ("unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc")
PATIENCE = 400.0  # seconds for whatever a busy machine does
LOST = 10  # seconds without an answer after which a node is down

# `cred_expire` is how long a requeued job waits, at the least. A node has what is written here, whatever the machine
# has; its GPU is a number, /dev/null being no device.
CONFIGURATION = """\
ClusterName=minitron
SlurmctldHost=control
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SlurmdTimeout={lost}
ReturnToService=2
MessageTimeout=5
KillWait=15
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 Port=17001 CPUs=2 RealMemory=1000 Gres=gpu:1
NodeName=n2 Port=17002 CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=batch Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""
# The cluster's first process, which ends with its standard input: nothing outlives a test that is killed. 192.0.2.0/24
# is for examples; host names are looked up only where there is an address other than loopback's.
FIRST = """\
set -e
mount --bind "$FOLDER/hosts" /etc/hosts
ip link set lo up
while read -r address name; do ip address add "$address/24" dev lo; done < "$FOLDER/hosts"
hostname control
munged --foreground --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" \\
  --pid-file="$FOLDER/munged.pid" --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munge.seed" &
slurmctld -D &
echo ready
read -r || true
"""
# The daemon of a node, with that node's host name; says its process id.
DAEMON = (
    'unshare --uts bash -c "hostname $NODE; exec slurmd -D -N $NODE" < /dev/null >> "$FOLDER/nodes.log" 2>&1 & echo $!'
)


def lacking() -> str:
    """Why there can be no cluster here; nothing where there can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if os.getuid() or missing:
        return f"needs root, and slurm-wlm, munge, iproute2 and util-linux: {', '.join(missing) or 'root'} is missing"
    tried = subprocess.run([*UNSHARE, "--net", "true"], capture_output=True, text=True)
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """Both nodes are up once it is made. Jobs are submitted in `folder`, and write their logs there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._daemons = folder, dict[str, str]()
        self._env = environment(PATH=f"{environment()['PATH']}:/usr/sbin:/sbin", PYTHONPATH=str(ROOT))
        self._env |= {"FOLDER": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
        self._write_files()
        self._first = subprocess.Popen(
            [*UNSHARE, "--net", "bash", "-c", FIRST],
            cwd=folder,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "control.log").open("wb"),
        )
        assert self._first.stdout
        try:
            assert self._first.stdout.readline() == b"ready\n", self.logs()
            children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text(encoding="utf-8")
            self._inside = ["nsenter", f"--target={children.strip()}", "--mount", "--net", "--uts", "--pid", "--wd"]
            for node in NODES:
                self.start_daemon(node)
            self.wait("both nodes are up", lambda: self.nodes() == dict.fromkeys(NODES, "idle"))
        except BaseException:
            self.stop()
            raise

    def _write_files(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        addresses = [f"192.0.2.{number} {name}\n" for number, name in enumerate(("control", *NODES), start=1)]
        files = {
            "slurm.conf": CONFIGURATION.format(folder=self.folder, lost=LOST),
            "gres.conf": "Name=gpu File=/dev/null\n",
            "hosts": "".join(addresses),
            "munge.key": os.urandom(32).hex(),
        }
        for name, text in files.items():
            (self.folder / name).touch(mode=0o600)
            (self.folder / name).write_text(text, encoding="utf-8")

    def stop(self) -> None:
        """Ends every process of it, and waits for that."""
        assert self._first.stdin and self._first.stdout
        self._first.stdin.close()
        self._first.wait(PATIENCE)
        self._first.stdout.close()

    def logs(self) -> str:
        return "".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log")))

    def ask(self, *command: str, check: bool = True, **env: str) -> str:
        """What a command says that is run on the control host, in `folder`."""
        words = [*self._inside, "--", *command]
        done = subprocess.run(words, env=self._env | env, capture_output=True, text=True, timeout=PATIENCE)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def wait(self, what: str, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            assert self._first.poll() is None and time.monotonic() < deadline, f"not so: {what}\n{self.logs()}"
            time.sleep(0.2)

    def submit(self, *words: str) -> str:
        """The number of the job that `sbatch WORDS` makes."""
        return self.ask("sbatch", "--parsable", *words)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def wait_for(self, number: str, state: str) -> dict[str, str]:
        """Until the job is in that state; what `job` says then."""
        self.wait(f"job {number} is {state}", lambda: self.job(number)["JobState"] == state)
        return self.job(number)

    def nodes(self) -> dict[str, str]:
        """The state of each node that has one."""
        said = self.ask("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T", check=False)
        return dict(line.split() for line in said.splitlines())

    def start_daemon(self, node: str) -> None:
        self._daemons[node] = self.ask("bash", "-c", DAEMON, NODE=node)

    def kill_daemon(self, node: str) -> None:
        """What it has started goes on; LOST seconds later the node is down."""
        self.ask("kill", "-KILL", self._daemons[node])


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster within the `with`."""
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.stop()
