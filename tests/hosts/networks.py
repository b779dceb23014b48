"""Hosts on one machine: each is a network namespace with an address of its own, and ranks run in it.

Shared memory is found through abstract Unix sockets, which a namespace does not share, so ranks on two of these hosts
meet over the network only. Two kinds of wires: the kernel's (veth and a bridge: fast, can be cut and limited), and
those of wires.py in user space (can also be late and lose packets).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ranks
from hosts.wires import in_namespace
from ranks import GRACE_S, RanksFailedError

HERE = Path(__file__).resolve().parent
PREFIX = "hxhosts"
OWN_FILES = Path("/etc/netns")  # what lies here in a namespace's folder, `ip netns exec` puts in the place of /etc's
FIRST_PORT = 29500  # of torchrun's store: a new namespace uses no port yet
# Gives the host a name of its own for messages, then becomes the command, with the same pid.
NAMED = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"

_networks = itertools.count()


def why_not() -> str:
    """Why this machine cannot have such hosts, in words for a skipped test; empty where it can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces (HXCOMM_HOST_ID stands in for hosts in other tests)"
    missing = [command for command in ("ip", "tc", "ss", "unshare") if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux"
    if not Path("/proc/net/if_inet6").exists():
        return "this kernel has no IPv6"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, timeout=10)
    return f"no network namespace can be made here: {tried.stderr.strip()}" if tried.returncode else ""


def system(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def sweep() -> None:
    """Removes the hosts of test runs that were killed before they could."""
    for name in re.findall(rf"^{PREFIX}-\d+\S*", system("ip", "netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            remove(name)


def remove(namespace: str) -> None:
    # By namespace, not by process group: torchrun puts its ranks into groups of their own.
    for pid in system("ip", "netns", "pids", namespace).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    system("ip", "netns", "delete", namespace)
    shutil.rmtree(OWN_FILES / namespace, ignore_errors=True)


@dataclass
class Host:
    """One host of a Network. Its interface is eth0, and commands on every host resolve its name."""

    number: int
    namespace: str
    network: Network = field(repr=False)

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def address(self) -> str:
        return f"10.0.0.{self.number + 1}"

    @property
    def address6(self) -> str:
        return f"fd00::{self.number + 1:x}"

    @property
    def begin(self) -> list[str]:
        """What a command begins with, so that it runs here; it keeps its process id."""
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", sys.executable, "-Sc", NAMED, self.name]

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen[str]:
        """Starts a command here; it ends with the network at the latest. `how` is Popen's."""
        process = subprocess.Popen(
            [*self.begin, *argv], env={**os.environ, **(env or {})}, text=True, start_new_session=True, **how
        )
        self.network.started.append(process)
        return process

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> str:
        """What a command printed here. Raises AssertionError where it fails or does not end in time."""
        process = self.start(argv, env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            raise AssertionError(f"{argv} on {self.name} took more than {timeout_s:g} s; printed {printed}") from None
        assert process.returncode == 0, f"{argv} on {self.name} exited {process.returncode}; printed {printed}"
        return printed

    def pids(self) -> list[int]:
        """Every process on this host."""
        return [int(pid) for pid in system("ip", "netns", "pids", self.namespace).split()]

    def disconnect(self) -> None:
        """Takes the wire out in the middle: nothing arrives any more, and no end is told."""
        self.network.connect(self.number, False)

    def connect(self) -> None:
        self.network.connect(self.number, True)

    def limit(self, rate: str) -> None:
        """At most so much leaves this host: limit("100mbit"), as tc has it."""
        shaped = ("tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
        system("tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", *shaped)

    def reset_connections(self, peer: Host) -> None:
        """Ends every TCP connection with a peer: ECONNABORTED here, ECONNRESET there. Loopback stays."""
        for address in (peer.address, f"[{peer.address6}]"):
            system("ip", "netns", "exec", self.namespace, "ss", "-K", "state", "connected", "dst", address)


class Network:
    """Hosts 0 to n - 1, each reaching each: 10.0.0.1 and fd00::1 is host 0. To be closed."""

    def __init__(self, n_hosts: int, *, in_user_space: bool = False) -> None:
        self.started: list[subprocess.Popen[str]] = []
        self.in_user_space = in_user_space
        self._name = f"{PREFIX}-{os.getpid()}-{next(_networks)}"
        self._ports = itertools.count(FIRST_PORT)
        self._cut: set[int] = set()
        self._wires: subprocess.Popen[str] | None = None
        self.hosts = [Host(number, f"{self._name}-{number}", self) for number in range(n_hosts)]
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        middle = f"{self._name}-middle"
        for namespace in (*(host.namespace for host in self.hosts), *(() if self.in_user_space else (middle,))):
            system("ip", "netns", "add", namespace)
            system("ip", "-n", namespace, "link", "set", "lo", "up")
            # Else an address of IPv6 is of no use for a second, until the kernel knows that no one else has it.
            no_wait = "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad"
            system("ip", "netns", "exec", namespace, "sh", "-c", no_wait)
        if self.in_user_space:
            command = [sys.executable, str(HERE / "wires.py"), *(host.namespace for host in self.hosts)]
            self._wires = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._await_wires()
        else:
            system("ip", "-n", middle, "link", "add", "bridge", "type", "bridge")
            system("ip", "-n", middle, "link", "set", "bridge", "up")
        names = [f"{address} {host.name}\n" for host in self.hosts for address in (host.address, host.address6)]
        for host in self.hosts:
            (OWN_FILES / host.namespace).mkdir(parents=True)
            (OWN_FILES / host.namespace / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n" + "".join(names))
            inside = ("ip", "-n", host.namespace)
            if not self.in_user_space:
                ends = ("type", "veth", "peer", "name", f"port{host.number}", "netns", middle)
                system("ip", "link", "add", "eth0", "netns", host.namespace, *ends)
                system("ip", "-n", middle, "link", "set", f"port{host.number}", "master", "bridge", "up")
            system(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
            system(*inside, "addr", "add", f"{host.address6}/64", "dev", "eth0")
            system(*inside, "link", "set", "eth0", "up")

    def _await_wires(self) -> None:
        assert self._wires is not None and self._wires.stdout is not None
        answer = self._wires.stdout.readline()
        assert answer == "done\n", f"the process of the wires ended: {self._wires.wait()}"

    def _tell_wires(self, **change: Any) -> None:
        assert self._wires is not None and self._wires.stdin is not None, "make the network with in_user_space=True"
        self._wires.stdin.write(json.dumps(change) + "\n")
        self._wires.stdin.flush()
        self._await_wires()

    def delay(self, seconds: float) -> None:
        """Every packet is so late from now on, each way."""
        self._tell_wires(delay_s=seconds)

    def lose(self, fraction: float) -> None:
        """So many packets are lost from now on, at random, the same in each run."""
        self._tell_wires(lost=fraction)

    def connect(self, host: int, connected: bool) -> None:
        self._cut = self._cut - {host} if connected else self._cut | {host}
        if self.in_user_space:
            self._tell_wires(cut=sorted(self._cut))
        else:
            change = ("master", "bridge") if connected else ("nomaster",)
            system("ip", "-n", f"{self._name}-middle", "link", "set", f"port{host}", *change)

    def close(self) -> None:
        """Ends every process on the hosts, and removes them."""
        there = re.findall(rf"^{self._name}-\S+", system("ip", "netns", "list"), re.MULTILINE)
        for namespace in there:
            remove(namespace)
        for process in self.started:
            process.wait(timeout=GRACE_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if self._wires is not None:
            self._wires.kill()
            self._wires.communicate()

    def run_ranks(
        self,
        fn_or_path: Callable[..., Any] | str | Path,
        ranks_on: Sequence[int],
        *args: Any,
        backend: str | None = "hxcomm",
        timeout_s: float = 60.0,
        op_timeout_s: float = 30.0,
        env: Mapping[str, str] | None = None,
        expect: Mapping[int, signal.Signals | int | str] | None = None,
        ipv6: bool = False,
    ) -> list[Any]:
        """As ranks.run_ranks, with ranks_on[h] ranks on host h: (1, 3) puts rank 0 on host 0 and 1 to 3 on host 1.

        MASTER_ADDR is host 0's address; the store is this process's, so that it outlives every rank.
        """
        layout = list(placed(ranks_on))

        def place(rank: int) -> tuple[Sequence[str], Mapping[str, str]]:
            host, local = layout[rank]
            return self.hosts[host].begin, {
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(ranks_on[host]),
                "GROUP_RANK": str(host),
                "GROUP_WORLD_SIZE": str(len(ranks_on)),
            }

        first = self.hosts[0]
        master = first.address6 if ipv6 else first.address
        store, address = in_namespace(first.namespace, lambda: ranks.rendezvous(master))
        try:
            given = {**address, **(env or {})}
            return ranks.run_placed(
                place, fn_or_path, len(layout), args, backend, timeout_s, op_timeout_s, given, expect or {}
            )
        finally:
            del store

    def torchrun(
        self,
        program: str | Path,
        ranks_on: Sequence[int],
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 90.0,
    ) -> list[str]:
        """Runs a program as a user does, by one torchrun a host; what each rank printed to standard output.

        RanksFailedError, with everything that was printed, where a torchrun fails or does not end in time.
        """
        port = str(next(self._ports))
        with tempfile.TemporaryDirectory(prefix="hosts-") as name:
            folder = Path(name)
            agents = []
            for host, count in enumerate(ranks_on):
                argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(ranks_on))]
                argv += ["--node-rank", str(host), "--nproc-per-node", str(count)]
                argv += ["--master-addr", self.hosts[0].address, "--master-port", port]
                argv += ["--log-dir", f"{folder}/{host}", "--redirects", "3", str(program), *args]
                with (folder / f"agent{host}.txt").open("wb") as output:
                    how = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                    agents.append(self.hosts[host].start(argv, {"OMP_NUM_THREADS": "1", **(env or {})}, **how))
            if problems := wait_for_agents(agents, timeout_s):
                shown = [f"---- {path.relative_to(folder)}:\n{tail(path)}" for path in sorted(folder.rglob("*.*"))]
                raise RanksFailedError("\n".join([f"torchrun {program} (limit {timeout_s:g} s):", *problems, *shown]))
            return [
                next((folder / str(host)).rglob(f"attempt_0/{local}/stdout.log")).read_text(errors="replace")
                for host, local in placed(ranks_on)
            ]


def wait_for_agents(agents: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    """What went wrong with torchrun's processes, all of which have ended."""
    deadline = time.monotonic() + timeout_s
    problems = []
    for host, agent in enumerate(agents):
        try:
            status = agent.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"torchrun on host {host} did not end in time")
            agent.terminate()  # upon which it ends its ranks
            with suppress(subprocess.TimeoutExpired):
                agent.wait(timeout=GRACE_S)
            agent.kill()
            agent.wait()
            continue
        if status != 0:
            problems.append(f"torchrun on host {host} exited {status}")
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return problems


def placed(ranks_on: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(host, local rank) of each rank."""
    for host, count in enumerate(ranks_on):
        yield from ((host, local) for local in range(count))


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-ranks.SHOWN_BYTES :] if path.is_file() else ""
