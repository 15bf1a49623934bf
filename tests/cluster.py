"""Clusters on this machine: two hosts joined by a cable (network namespaces), and a Slurm of two nodes.

They share one kernel and one disk: nothing here tests a shared file system or a network that loses packets.
"""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from launching import free_port


def run(*command, check=True, **named) -> str:
    """What a command printed; raises AssertionError with it where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **named)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Hosts:
    """Two hosts with a network, a name and a hosts file of their own, joined by a veth pair; root only.

    `tcp_retries` is Linux's net.ipv4.tcp_retries2 on them: how often unanswered data is sent again before a connection
    is given up. Its default, 15, takes over 15 minutes.
    """

    def __init__(self, names=("node0", "node1"), tcp_retries: int = 5):
        mark = os.getpid() % 10_000  # several test sessions may share the machine
        self.spaces = [f"nd{mark}-{number}" for number in (0, 1)]
        self.devices = [f"nd{mark}v{number}" for number in (0, 1)]
        self.names = list(names)
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.tcp_retries = tcp_retries

    def __enter__(self) -> "Hosts":
        try:
            run("ip", "link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
            for number, space in enumerate(self.spaces):
                run("ip", "netns", "add", space)
                files = Path("/etc/netns", space)
                files.mkdir(parents=True, exist_ok=True)
                table = [f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True)]
                (files / "hosts").write_text("127.0.0.1 localhost\n" + "".join(table))
                (files / "nsswitch.conf").write_text("hosts: files\n")
                run("ip", "link", "set", self.devices[number], "netns", space)
                run("ip", "-n", space, "addr", "add", f"{self.addresses[number]}/24", "dev", self.devices[number])
                run("ip", "-n", space, "link", "set", self.devices[number], "up")
                run("ip", "-n", space, "link", "set", "lo", "up")
                setting = f"echo {self.tcp_retries} > /proc/sys/net/ipv4/tcp_retries2"
                run("ip", "netns", "exec", space, "sh", "-c", setting)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        run("ip", "link", "del", self.devices[0], check=False)
        for space in self.spaces:
            run("ip", "netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)

    def start(self, number: int, command, output: Path, env=None) -> subprocess.Popen:
        """Starts a command as the root of a host, in a session of its own."""
        into = ["ip", "netns", "exec", self.spaces[number], "unshare", "--uts", "sh", "-c"]
        into += ['hostname "$0"; exec "$@"', self.names[number], *map(str, command)]
        given = {**os.environ, "GLOO_SOCKET_IFNAME": self.devices[number], "OMP_NUM_THREADS": "1", **(env or {})}
        with output.open("a") as file:
            return subprocess.Popen(into, env=given, stdout=file, stderr=file, start_new_session=True)

    def cut(self) -> None:
        """Packets go to a card that is not there: they are lost, and no error reaches anybody."""
        self._neighbours("replace", "lladdr", "02:00:00:00:00:01", "nud", "permanent")

    def mend(self) -> None:
        """The network is as before `cut`."""
        self._neighbours("del")

    def _neighbours(self, action: str, *where: str) -> None:
        for space, device, other in zip(self.spaces, self.devices, reversed(self.addresses), strict=True):
            run("ip", "-n", space, "neigh", action, other, *where, "dev", device)


@functools.cache
def can_make_hosts() -> bool:
    """Whether this user may make network namespaces and join them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with Hosts():
            return True
    except AssertionError:
        return False


def end(*processes: subprocess.Popen) -> None:
    """Kills what is left of the sessions that these processes lead."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SLURM_CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
SchedulerParameters=bf_interval=2,batch_sched_delay=0
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=1:00:00 State=UP OverSubscribe=YES
"""


class Slurm:
    """A Slurm of two nodes, n1 and n2, on this machine, with everything of it in one folder; root only.

    `env` is what its commands need; the nodes' names don't resolve, so the address to meet at is given, too.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def __enter__(self) -> "Slurm":
        self.folder.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        first = free_port()
        names = {"host": socket.gethostname(), "folder": self.folder, "ports": [free_port(), first, first + 1]}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**names))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = {"key-file": key, "socket": self.folder / "munge.socket", "seed-file": self.folder / "munge.seed"}
        munge |= {"pid-file": self.folder / "munged.pid", "log-file": self.folder / "munged.log"}
        try:
            run("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
            self.call("slurmctld")
            for node in ("n1", "n2"):
                self.call("slurmd", "-N", node)
            deadline = time.monotonic() + 30
            while self.call("sinfo", "-h", "-N", "-o", "%T").split() != ["idle", "idle"]:
                assert time.monotonic() < deadline, self.call("sinfo", "-N", "-l")
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        run("scancel", "--full", "--signal=KILL", "--user=root", check=False, env=self.env)
        for daemon in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            file = self.folder / f"{daemon}.pid"
            if file.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.read_text()), signal.SIGTERM)

    def call(self, *command) -> str:
        return run(*command, env=self.env)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        return dict(part.partition("=")[::2] for part in self.call("scontrol", "show", "job", number).split())
