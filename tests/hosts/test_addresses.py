"""Which address a rank tells other hosts, by HXCOMM_IFNAME or by MASTER_ADDR."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable

import pytest
import zmq
from hosts.networks import Host, Network, system

from hxcomm import addresses, environment
from hxcomm.addresses import Address

LO, LO6 = Address("127.0.0.1", "lo"), Address("::1", "lo")
ETH0, ETH1, ETH10 = Address("10.0.0.1", "eth0"), Address("10.1.0.1", "eth1"), Address("10.10.0.1", "eth10")
IB, DOCKER = Address("10.2.0.1", "ib0"), Address("172.17.0.1", "docker0")
LINK = Address("fe80::1", "eth0")
THERE = [LO, DOCKER, ETH0, ETH1, ETH10, IB, LO6, LINK]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.VARIABLES, "MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Address]:
    """What is chosen of THERE with these variables, where `route` is the source address towards any target."""

    def choose(route: str = "", there: list[Address] = THERE, **variables: str) -> Address:
        monkeypatch.setattr(addresses, "local_addresses", lambda: there)
        monkeypatch.setattr(addresses, "_source_towards", lambda target: route)
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        return addresses.choose()

    return choose


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("eth", ETH0),  # a prefix; the kernel's order decides
        ("eth1", ETH1),
        ("=eth1", ETH1),
        ("=eth10", ETH10),
        ("ib,eth", ETH0),  # the order of the list decides nothing
        ("=ib0,eth1", ETH1),  # = is said once, of the whole list
        ("^docker,lo", ETH0),
        ("^eth,docker", IB),  # ^, too; and leaves no loopback over
        ("^=eth0,eth1", ETH10),
        ("docker", DOCKER),
        ("=lo", LO),
    ],
)
def test_ifname_is_read_as_nccl_reads_it(chosen: Callable[..., Address], wanted: str, found: Address) -> None:
    assert chosen(HXCOMM_IFNAME=wanted) == found


def test_of_several_interfaces_that_match_the_one_towards_the_master_is_taken(chosen: Callable[..., Address]) -> None:
    assert chosen(HXCOMM_IFNAME="eth", route="10.1.0.1", MASTER_ADDR="10.1.0.9") == ETH1
    assert chosen(HXCOMM_IFNAME="^=eth1", route="10.1.0.1", MASTER_ADDR="10.1.0.9") == ETH0


@pytest.mark.parametrize("wanted", ["=eth", "wlan", "^eth,ib,docker,lo", "^eth,ib,docker"])
def test_an_ifname_that_matches_nothing_raises_with_the_interfaces_there_are(
    chosen: Callable[..., Address], wanted: str
) -> None:
    with pytest.raises(ValueError) as raised:
        chosen(HXCOMM_IFNAME=wanted)
    told = str(raised.value)
    assert told.startswith(f"HXCOMM_IFNAME={wanted!r} matches none ")
    assert all(f"{address.interface} {address.text}" in told for address in THERE)


def test_without_ifname_the_route_to_the_master_decides_then_what_is_likely(chosen: Callable[..., Address]) -> None:
    assert chosen(route="10.1.0.1", MASTER_ADDR="10.1.0.9") == ETH1
    assert chosen(route="fe80::1%eth0", MASTER_ADDR="10.1.0.9") == LINK
    assert chosen(route="fe80::1%eth1", MASTER_ADDR="10.1.0.9") == ETH0  # the same address, on another link
    assert chosen() == ETH0
    assert chosen(there=[LO, DOCKER, LINK]) == LINK
    assert chosen(there=[LO, DOCKER]) == DOCKER


def test_a_master_that_only_this_host_knows_as_loopback_gives_no_loopback(chosen: Callable[..., Address]) -> None:
    assert chosen(route="127.0.0.1", MASTER_ADDR="name-of-this-host.invalid") == ETH0
    with pytest.raises(ValueError, match=r"none leads to other hosts of this host's interfaces .*: lo 127\.0\.0\.1"):
        chosen(there=[LO], MASTER_ADDR="name-of-this-host.invalid")


@pytest.mark.parametrize("master", ["127.0.0.1", "127.8.8.8", "localhost", "LocalHost"])
def test_loopback_is_right_where_every_rank_is_told_so_by_the_master(
    chosen: Callable[..., Address], master: str
) -> None:
    assert chosen(MASTER_ADDR=master) == LO


def test_loopback_is_right_where_one_launcher_has_all_ranks(chosen: Callable[..., Address]) -> None:
    told = {"MASTER_ADDR": "name-of-this-host.invalid", "WORLD_SIZE": "4"}
    assert chosen(**told, LOCAL_WORLD_SIZE="4") == LO
    assert chosen(**told, LOCAL_WORLD_SIZE="2") == ETH0


def test_the_addresses_of_this_machine_are_found_and_loopback_is_the_way_to_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = addresses.local_addresses()
    lo = dict(socket.if_nameindex())[1]
    assert Address("127.0.0.1", lo) in there
    assert {address.interface for address in there} <= {name for _, name in socket.if_nameindex()}
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert addresses.choose() == Address("127.0.0.1", lo)


@pytest.mark.parametrize(
    ("address", "port", "endpoint"),
    [
        (ETH0, 5, "tcp://10.0.0.1:5"),
        (Address("fd00::1", "eth0"), "*", "tcp://[fd00::1]:*"),
        (LINK, "*", "tcp://[fe80::1%eth0]:*"),
    ],
)
def test_an_address_is_written_as_zeromq_reads_it(address: Address, port: int | str, endpoint: str) -> None:
    assert address.endpoint(port) == endpoint


def test_zeromq_connects_to_what_it_bound() -> None:
    for address in (address for address in addresses.local_addresses() if address.is_loopback):
        with zmq.Context() as context, context.socket(zmq.PULL) as puller, context.socket(zmq.PUSH) as pusher:
            for sock in (puller, pusher):
                sock.setsockopt(zmq.IPV6, 1)
                sock.setsockopt(zmq.LINGER, 0)
            puller.bind(address.endpoint("*"))
            port = int(puller.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
            pusher.connect(addresses.endpoint_of_peer(address.text, port, address))
            pusher.send(b"there")
            assert puller.poll(10_000)
            assert puller.recv() == b"there"


def test_a_peers_link_local_address_is_looked_for_on_our_own_link() -> None:
    assert addresses.endpoint_of_peer("fe80::9", 7, Address("fe80::1", "eth3")) == "tcp://[fe80::9%eth3]:7"
    assert addresses.endpoint_of_peer("::ffff:10.0.0.9", 7, ETH0) == "tcp://10.0.0.9:7"


@pytest.mark.parametrize(
    ("text", "port", "told"),
    [
        ("host-b", 1, "'host-b' is not an IP address"),
        ("10.0.0.9 ", 1, "is not an IP address"),
        ("10.0.0.9:5;tcp://10.0.0.8", 1, "is not an IP address"),
        ("10.0.0.9", 0, "0 is not a port"),
        ("10.0.0.9", 65536, "65536 is not a port"),
        ("0.0.0.0", 1, "no address of one host"),
        ("::", 1, "no address of one host"),
        ("224.0.0.1", 1, "no address of one host"),
        ("fe80::1%eth0", 1, "no address of one host"),
        ("127.0.0.1", 1, "127.0.0.1 is the loopback address of the host it comes from, and this rank's is 10.0.0.1"),
        ("::1", 1, "is the loopback address of the host it comes from"),
        ("::ffff:127.0.0.1", 1, "is the loopback address of the host it comes from"),
    ],
)
def test_what_a_peer_says_is_checked_before_it_is_used(text: str, port: int, told: str) -> None:
    with pytest.raises(ValueError) as raised:
        addresses.endpoint_of_peer(text, port, ETH0)
    assert told in str(raised.value)


# What the kernel of a host with several interfaces says.

CHOOSE = """
import json
from hxcomm import addresses
print(json.dumps([addresses.choose().__dict__, [address.__dict__ for address in addresses.local_addresses()]]))
"""


def chosen_on(host: Host, **variables: str) -> tuple[Address, list[Address]]:
    mine, there = json.loads(host.run([sys.executable, "-c", CHOOSE], variables))
    return Address(**mine), [Address(**each) for each in there]


def add_interface(host: Host, name: str, *texts: str) -> None:
    system("ip", "-n", host.namespace, "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
    system("ip", "-n", host.namespace, "link", "set", f"{name}-end", "up")
    for text in texts:
        system("ip", "-n", host.namespace, "address", "add", text, "dev", name)


def test_on_several_interfaces_the_kernels_route_to_the_master_decides(network: Callable[..., Network]) -> None:
    host = network(1).hosts[0]
    eth0, eth06 = Address(host.address, "eth0"), Address(host.address6, "eth0")
    add_interface(host, "a0", "10.9.0.1/24", "10.9.0.2/24", "fd09::1/64")
    assert all(address.interface != "a0" for address in chosen_on(host)[1])  # it is down
    system("ip", "-n", host.namespace, "link", "set", "a0", "up")
    mine, there = chosen_on(host, MASTER_ADDR="10.0.0.9")
    assert mine == eth0
    assert {Address("10.9.0.2", "a0"), Address("fd09::1", "a0"), eth0, eth06} < set(there)
    assert chosen_on(host, MASTER_ADDR="fd00::9")[0] == eth06
    assert chosen_on(host, MASTER_ADDR="10.9.0.9")[0] == Address("10.9.0.1", "a0")
    assert chosen_on(host, MASTER_ADDR="10.9.0.2")[0] == Address("10.9.0.2", "a0")  # the master is this host
    assert chosen_on(host, MASTER_ADDR="fd09::9")[0] == Address("fd09::1", "a0")
    assert chosen_on(host, MASTER_ADDR="10.0.0.9", HXCOMM_IFNAME="a")[0] == Address("10.9.0.1", "a0")
    system("ip", "-n", host.namespace, "route", "add", "default", "via", "10.9.0.9")
    assert chosen_on(host)[0] == Address("10.9.0.1", "a0")  # no master: the default route


def test_a_link_local_address_is_chosen_for_a_link_local_master_and_can_be_bound(
    network: Callable[..., Network],
) -> None:
    first, second = network(2).hosts
    for host in (first, second):
        for old in (f"{host.address}/24", f"{host.address6}/64"):
            system("ip", "-n", host.namespace, "address", "delete", old, "dev", "eth0")
    listed = chosen_on(second)[1]
    (theirs,) = [address for address in listed if address.interface == "eth0"]
    mine, _ = chosen_on(first, MASTER_ADDR=f"{theirs.text}%eth0")
    assert mine.text.startswith("fe80::") and mine.interface == "eth0"
    program = """
import zmq
with zmq.Context() as context, context.socket(zmq.{kind}) as sock:
    sock.setsockopt(zmq.IPV6, 1)
    sock.setsockopt(zmq.RCVTIMEO, 20_000)
    sock.{attach}
    {use}
"""
    receive = program.format(kind="PULL", attach=f"bind({mine.endpoint(7)!r})", use="print(sock.recv().decode())")
    endpoint = addresses.endpoint_of_peer(mine.text, 7, theirs)
    send = program.format(kind="PUSH", attach=f"connect({endpoint!r})", use="sock.send(b'over the link')")
    sender = second.start([sys.executable, "-c", send])
    assert first.run([sys.executable, "-c", receive]) == "over the link\n"
    assert sender.wait(timeout=20) == 0
