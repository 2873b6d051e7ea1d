"""Several hosts on one machine: network namespaces joined by a bridge, and a Spark cluster in them.

Each host has a name, the address of an interface by which the others reach it, called otherwise on
each, and, as hosts with containers do, a second network with an address that all of them have. A
firewall on each lets through what docs/network.md lists, and counts what else arrives. Needs root,
iproute2 and nftables; nothing outside of the namespaces is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pyspark

from tests.conftest import spark_home
from tests.faults import harness

HOSTS = {"host-a": "10.77.0.1", "host-b": "10.77.0.2", "host-c": "10.77.0.3"}
INTERFACES = {"host-a": "eth0", "host-b": "ens5", "host-c": "net7"}
MASTER = "spark://host-a:7077"
PORTS = {
    "spark.mnist.port": "35000-35003",
    "spark.driver.port": "35500",
    "spark.driver.blockManager.port": "35501",
    "spark.blockManager.port": "35600",
}
RANKS_PORTS = "40000-40999"
"""Ports that the systems of the hosts give to whoever asks for any."""
OPEN = {
    "host-a": f"7077, 35600-35615, {RANKS_PORTS}",
    "host-b": f"35600-35615, {RANKS_PORTS}",
    "host-c": "35000-35003, 35500, 35501",
}
FIREWALL = """
table inet firewall {
  counter others {}
  chain input {
    type filter hook input priority 0; policy accept;
    iif lo accept
    ct state established,related accept
    meta l4proto != tcp accept
    tcp dport { OPEN } accept
    counter name others drop
  }
}
"""
CONTAINERS = "172.17.0.1/16"
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
QUICK = {  # Spark's own bounds for what is lost: else minutes
    "spark.network.timeout": "15s",
    "spark.network.timeoutInterval": "5s",
    "spark.executor.heartbeatInterval": "3s",
}
PATIENT_MASTER = "-Dspark.worker.timeout=15"


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "nft", "unshare", "mount") if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} missing: iproute2, nftables and util-linux have them"
    space = f"tried-{os.getpid()}"
    tried = _ip(f"ip netns add {space}", check=False)
    if tried.returncode == 0:
        tried = _ip(f"ip -n {space} link add tried type bridge", check=False)
        _ip(f"ip netns del {space}")
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else None


def _ip(command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command.split(), check=check, text=True, capture_output=True)


class Hosts:
    """A context manager: the hosts, their network and what runs on them.

    Args:
        home: A directory that all hosts share.
        called: What every host is called, as containers may be. Without it each has its own name.
        addresses: Address of that name on each host; none where it does not resolve.
    """

    def __init__(
        self, home: Path, called: str = "", addresses: Mapping[str, str] | None = None
    ) -> None:
        self.home, self._called, self._addresses = home, called, addresses or {}
        self.store = home / "models"
        self._mark = f"sm{os.getpid()}"
        self._switch = self._space("switch")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as stack:
            self._add(stack, self._switch)
            _ip(f"ip -n {self._switch} link add bridge up type bridge")
            for name, address in HOSTS.items():
                space, its = self._space(name), INTERFACES[name]
                self._add(stack, space)
                for command in (
                    f"ip -n {self._switch} link add {name} type veth peer name {its} netns {space}",
                    f"ip -n {self._switch} link set {name} master bridge up",
                    f"ip -n {space} link set lo up",
                    f"ip -n {space} link set {its} up",
                    f"ip -n {space} address add {address}/24 dev {its}",
                    f"ip -n {space} link add docker0 up type veth peer name pod0",
                    f"ip -n {space} link set pod0 up",
                    f"ip -n {space} address add {CONTAINERS} dev docker0",
                ):
                    _ip(command)
                self._protect(name)
            lines = [f"{address} {name}" for name, address in HOSTS.items()]
            for name in HOSTS:
                own = [f"{self._addresses[name]} {self._called}"] if self._addresses else []
                text = "\n".join(["127.0.0.1 localhost", *lines, *own, ""])
                (self.home / f"hosts-{name}").write_text(text)
            self._home = spark_home(self.home / "spark")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for name in HOSTS:
                self.die(name)

    def _space(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def _add(self, stack: contextlib.ExitStack, space: str) -> None:
        _ip(f"ip netns add {space}")
        stack.callback(_ip, f"ip netns del {space}")

    def _protect(self, host: str) -> None:
        """Set up a host's firewall, and the range of ports that its system gives."""
        inside = ["ip", "netns", "exec", self._space(host)]
        rules = FIREWALL.replace("OPEN", OPEN[host])
        subprocess.run([*inside, "nft", "--file", "-"], input=rules, text=True, check=True)
        setting = f"net.ipv4.ip_local_port_range={RANKS_PORTS.replace('-', ' ')}"
        subprocess.run([*inside, "sysctl", "--quiet", "--write", setting], check=True)

    def refused(self) -> dict[str, int]:
        """Return how many packets the firewall of each host kept out."""
        counts = {}
        for host in HOSTS:
            words = f"ip netns exec {self._space(host)} nft --json list counters"
            (counter,) = [
                entry["counter"]
                for entry in json.loads(_ip(words).stdout)["nftables"]
                if "counter" in entry
            ]
            counts[host] = counter["packets"]
        return counts

    def start(self, host: str, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Start a program on a host; it says what it has to say in ``HOST.log``, stdout apart."""
        known = {k: v for k, v in os.environ.items() if k not in ("SPARK_LOCAL_IP", "JAVA_OPTS")}
        inside = ["unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh"]
        inside += [self.home / f"hosts-{host}", self._called or host]
        if self._called:  # by which Spark finds no address
            environment["SPARK_LOCAL_IP"] = HOSTS[host]
        with (self.home / f"{host}.log").open("a") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._space(host), *inside, *command],
                cwd=self.home, stdout=subprocess.PIPE, stderr=log, text=True,
                env={
                    **known, "SPARK_HOME": str(self._home), "PYSPARK_PYTHON": sys.executable,
                    **environment,
                },
            )  # fmt: skip

    def master(self) -> None:
        """Start Spark's master on the first host."""
        self._spark("host-a", "master.Master", "--port", "7077", SPARK_MASTER_OPTS=PATIENT_MASTER)

    def worker(self, host: str, cores: int = 2) -> None:
        """Start a worker of Spark's on a host."""
        size = ("--cores", str(cores), "--memory", "3g")
        self._spark(host, "worker.Worker", *size, "--work-dir", str(self.home / "work"), MASTER)

    def _spark(self, host: str, name: str, *words: str, **environment: str) -> None:
        program = Path(pyspark.__file__).parent / "bin" / "spark-class"
        given = ("--host", host, "--webui-port", "0")
        self.start(host, program, f"org.apache.spark.deploy.{name}", *given, *words, **environment)

    def submit(self, job: Path, *words: object, **settings: str) -> subprocess.Popen[str]:
        """Submit a script from the third host, in client mode."""
        program = Path(pyspark.__file__).parent / "bin" / "spark-submit"
        given = {
            "spark.ui.enabled": "false",
            "spark.executor.memory": "1g",
            **QUICK,
            **PORTS,
            **settings,
        }
        flags = [word for item in given.items() for word in ("--conf", "=".join(item))]
        return self.start("host-c", program, "--master", MASTER, *flags, job, *map(str, words))

    def plugged(self, host: str, *, into: bool) -> None:
        """Plug the cable of a host in, or out."""
        _ip(f"ip -n {self._switch} link set {host} {'up' if into else 'down'}")

    def die(self, host: str) -> None:
        """End all that runs on a host, at once and without a word."""
        killed = []
        for pid in _ip(f"ip netns pids {self._space(host)}").stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                killed.append(psutil.Process(int(pid)))
                killed[-1].send_signal(signal.SIGKILL)
        psutil.wait_procs(killed, timeout=harness.PATIENCE)

    def bytes_to(self, host: str) -> int:
        """Return how many bytes the bridge has sent to a host so far."""
        found = _ip(f"ip -n {self._switch} -json -statistics link show {host}")
        return int(json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"])
