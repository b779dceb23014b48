"""The hosts that tests are given, held against plain TCP and gloo, which need nothing of ours."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts.networks import OWN_FILES, PREFIX, Host, Network, sweep, system
from hosts.wires import in_namespace
from ranks import RanksFailedError

HERE = Path(__file__).resolve().parent
WAIT_S = 20.0  # for what must happen
NOTHING_S = 0.5  # for what must not

kinds_of_wires = pytest.mark.parametrize("in_user_space", [False, True], ids=["kernel", "user-space"])
Networks = Callable[..., Network]


def connect(server: Host, client: Host, address: str) -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection, both in this process."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with in_namespace(server.namespace, lambda: socket.create_server((address, 0), family=family)) as listening:
        port = listening.getsockname()[1]
        there = in_namespace(client.namespace, lambda: socket.create_connection((address, port), timeout=WAIT_S))
        here, _ = listening.accept()
    for end in (here, there):
        end.settimeout(WAIT_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


def receive(sock: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or those until the end. (MSG_WAITALL does not wait where a socket has a timeout.)"""
    with sock.makefile("rb", buffering=0) as stream:
        got = b""
        while len(got) < nbytes and (more := stream.read(nbytes - len(got))):
            got += more
    return got


@kinds_of_wires
def test_every_host_reaches_every_other_by_both_versions_of_ip(network: Networks, in_user_space: bool) -> None:
    net = network(3, in_user_space=in_user_space)
    for server in net.hosts:
        for client in net.hosts:
            for address in (server.address, server.address6):
                here, there = connect(server, client, address)
                with here, there:
                    there.sendall(b"to the server")
                    assert receive(here, 13) == b"to the server"
                    here.sendall(b"back")
                    assert receive(there, 4) == b"back"


def test_two_hosts_have_names_that_both_resolve_and_no_sockets_in_common(network: Networks) -> None:
    net = network(2)
    ask = "import socket; print(socket.gethostname(), socket.gethostbyname('host1'))"
    names = [host.run([sys.executable, "-c", ask]) for host in net.hosts]
    assert names == ["host0 10.0.0.2\n", "host1 10.0.0.2\n"]
    with in_namespace(net.hosts[0].namespace, lambda: socket.socket(socket.AF_UNIX)) as listening:
        listening.bind("\0a name")
        listening.listen()
        with in_namespace(net.hosts[0].namespace, lambda: socket.socket(socket.AF_UNIX)) as same:
            same.connect("\0a name")
        with (
            in_namespace(net.hosts[1].namespace, lambda: socket.socket(socket.AF_UNIX)) as other,
            pytest.raises(ConnectionRefusedError),
        ):
            other.connect("\0a name")


@kinds_of_wires
def test_a_cut_wire_is_silent_and_a_mended_one_carries_what_was_sent_meanwhile(
    network: Networks, in_user_space: bool
) -> None:
    net = network(3, in_user_space=in_user_space)
    here, there = connect(net.hosts[0], net.hosts[1], net.hosts[0].address)
    with here, there:
        net.hosts[1].disconnect()
        here.sendall(b"unheard")
        there.sendall(b"unheard")
        assert select.select([here, there], [], [here, there], NOTHING_S) == ([], [], [])
        others = connect(net.hosts[0], net.hosts[2], net.hosts[0].address)
        for end in others:
            end.close()
        net.hosts[1].connect()
        assert receive(there, 7) == b"unheard"
        assert receive(here, 7) == b"unheard"


# Times are compared with what they cannot be below: load makes them longer only.


def test_a_delay_is_that_of_every_packet_each_way(network: Networks) -> None:
    net = network(2, in_user_space=True)
    here, there = connect(net.hosts[0], net.hosts[1], net.hosts[0].address)
    with here, there:
        net.delay(0.15)
        start = time.monotonic()
        there.sendall(b"x")
        assert receive(here, 1) == b"x"
        here.sendall(b"y")
        assert receive(there, 1) == b"y"
        assert time.monotonic() - start >= 0.3


def test_lost_packets_are_lost_and_tcp_repairs_it(network: Networks) -> None:
    net = network(2, in_user_space=True)
    here, there = connect(net.hosts[0], net.hosts[1], net.hosts[0].address)
    with here, there:
        net.lose(1.0)
        there.sendall(b"x")
        assert select.select([here], [], [], NOTHING_S) == ([], [], [])
        net.lose(0.1)
        sent = os.urandom(100_000)
        there.sendall(sent)
        assert receive(here, 100_001) == b"x" + sent


def test_a_limited_host_sends_no_faster_than_its_rate(network: Networks) -> None:
    net = network(2)
    here, there = connect(net.hosts[0], net.hosts[1], net.hosts[0].address)
    with here, there:
        net.hosts[1].limit("8mbit")
        there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        start = time.monotonic()
        there.sendall(bytes(400_000))
        receive(here, 400_000)
        assert time.monotonic() - start >= (400_000 - 65_536) / 1e6


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_connections_with_a_peer_are_reset_at_both_ends_and_others_are_not(network: Networks, ipv6: bool) -> None:
    net = network(3)
    address = net.hosts[0].address6 if ipv6 else net.hosts[0].address
    here, there = connect(net.hosts[0], net.hosts[1], address)
    other_here, other_there = connect(net.hosts[1], net.hosts[2], net.hosts[1].address)
    with here, there, other_here, other_there:
        net.hosts[1].reset_connections(net.hosts[0])
        with pytest.raises(ConnectionAbortedError):
            there.recv(1)
        with pytest.raises(ConnectionResetError):
            here.recv(1)
        other_there.sendall(b"x")
        assert receive(other_here, 1) == b"x"


def test_a_command_that_fails_or_hangs_is_an_error_with_what_it_printed(network: Networks) -> None:
    host = network(1).hosts[0]
    with pytest.raises(AssertionError, match=r"on host0 exited 3; printed last words"):
        host.run(["sh", "-c", "echo last words; exit 3"])
    with pytest.raises(AssertionError, match=r"on host0 took more than 0\.2 s; printed last words"):
        host.run(["sh", "-c", "echo last words; sleep 60"], timeout_s=0.2)
    assert host.pids() == []


def test_hosts_leave_no_process_and_no_namespace_behind(network: Networks) -> None:
    net = network(2, in_user_space=True)
    # A process in a group of its own, as torchrun's ranks are.
    started = net.hosts[0].start(["sh", "-c", "setsid sleep 60 & echo $!; sleep 60"], stdout=subprocess.PIPE)
    assert started.stdout is not None
    orphan = os.pidfd_open(int(started.stdout.readline()))
    net.close()
    assert select.select([orphan], [], [], WAIT_S)[0] == [orphan]
    os.close(orphan)
    assert net.hosts[0].namespace not in system("ip", "netns", "list")
    assert not (OWN_FILES / net.hosts[0].namespace).exists()


def test_hosts_of_a_test_run_that_was_killed_are_removed_by_the_next(network: Networks) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    kept, left = network(1).hosts[0].namespace, f"{PREFIX}-{ended.pid}-0-0"
    system("ip", "netns", "add", left)
    sweep()
    there = system("ip", "netns", "list")
    assert left not in there and kept in there


def gloo_sum(rank: int, world_size: int) -> tuple[str, str, str, int]:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([rank + 1])
    dist.all_reduce(tensor)
    return socket.gethostname(), os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], int(tensor.item())


def die_on_rank_2(rank: int, world_size: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ranks
@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_ranks_run_on_their_hosts_and_meet_over_the_network(network: Networks, ipv6: bool) -> None:
    found = network(2).run_ranks(gloo_sum, (1, 2), backend="gloo", ipv6=ipv6)
    assert found == [("host0", "0", "1", 6), ("host1", "0", "2", 6), ("host1", "1", "2", 6)]


@pytest.mark.ranks
def test_a_rank_on_another_host_may_be_expected_to_die(network: Networks) -> None:
    found = network(2).run_ranks(die_on_rank_2, (1, 2), backend=None, expect={2: signal.SIGKILL})
    assert found == [None, None, None]


@pytest.mark.ranks
def test_torchrun_on_every_host_starts_one_job(network: Networks) -> None:
    net = network(2)
    printed = net.torchrun(HERE / "sum_of_ranks.py", (1, 2), "gloo")
    assert printed == ["0 host0 6\n", "1 host1 6\n", "2 host1 6\n"]


@pytest.mark.ranks
def test_a_failing_torchrun_is_an_error_with_what_its_ranks_printed(network: Networks) -> None:
    with pytest.raises(RanksFailedError, match=r"torchrun on host 0 exited 1[\s\S]*nosuchbackend"):
        network(1).torchrun(HERE / "sum_of_ranks.py", (1,), "nosuchbackend")
