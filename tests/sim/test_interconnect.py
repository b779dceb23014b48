"""Interconnects: which links there are, and which of them a message takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.chip_files import TEXT, chip

from hxcomm.sim import chips
from hxcomm.sim.interconnect import Interconnect, InterconnectError, interconnect, parse_fault


def way(network: Interconnect, source: int, target: int) -> list[int]:
    """The nodes that a message passes, with both ends."""
    return [source, *(network.links[link].target for link in network.route(source, target))]


def check_routes(network: Interconnect) -> None:
    for source in range(network.world_size):
        for target in range(network.world_size):
            at = source
            for number in network.route(source, target):
                assert network.links[number].source == at
                assert network.links[number].bytes_per_s > 0
                at = network.links[number].target
            assert at == target


@pytest.mark.parametrize(
    ("topology", "n", "links", "ends", "passed"),
    [
        ("ring:8", 8, 16, (1, 6), [1, 0, 7, 6]),
        ("ring:8", 8, 16, (1, 5), [1, 2, 3, 4, 5]),  # ties go upwards
        ("line:8", 8, 14, (1, 6), [1, 2, 3, 4, 5, 6]),
        ("switch:8", 8, 16, (1, 6), [1, 8, 6]),
        ("full:8", 8, 56, (1, 6), [1, 6]),
        ("torus:4x4", 16, 64, (0, 15), [0, 3, 15]),
        ("torus:4x4", 16, 64, (5, 0), [5, 4, 0]),
        ("mesh:4x4", 16, 48, (0, 15), [0, 1, 2, 3, 7, 11, 15]),
        ("torus:2x3x4", 24, 24 + 48 + 48, (0, 23), [0, 1, 5, 23]),
        ("ring:8/switch:4", 32, 2 * 32 + 2 * 32, (1, 18), [1, 2, 34, 18]),
        ("switch:2/full:2", 4, 2 * 4 + 4, (0, 3), [0, 4, 1, 3]),
        ("ring:2", 2, 2, (1, 0), [1, 0]),
        ("ring", 1, 0, (0, 0), [0]),
    ],
)
def test_messages_take_the_shortest_way_inner_dimension_first(
    topology: str, n: int, links: int, ends: tuple[int, int], passed: list[int]
) -> None:
    network = interconnect(chip(), n, topology)
    assert len(network.links) == links
    assert way(network, *ends) == passed
    check_routes(network)


def test_a_ring_with_one_direction_goes_round() -> None:
    network = interconnect(chip(links__0__directions=1), 4)
    assert len(network.links) == 4
    assert way(network, 1, 0) == [1, 2, 3, 0]


def test_fewer_ranks_than_a_ring_has_places_are_an_open_line() -> None:
    network = interconnect(chip(links__0__shape=[8]), 4)
    assert way(network, 3, 0) == [3, 2, 1, 0]
    assert network.text().startswith("line of 4, 1 GB/s a link, 500 ns a hop, store_and_forward")
    assert interconnect(chip(links__0__shape=[8]), 8).rotates
    with pytest.raises(InterconnectError, match=r"4 of a ring of 8 with one direction cannot answer each other"):
        interconnect(chip(links__0__shape=[8], links__0__directions=1), 4)


def test_ranks_that_do_not_fit_are_refused() -> None:
    for n, topology, said in [
        (9, "torus:4x4", "9 ranks do not fill torus:4x4: 9 of them are no multiple of the 4 of a torus"),
        (32, "torus:4x4", "32 ranks, but torus:4x4 has only 16 places: give a larger topology"),
        (12, "ring:8/switch:4", "12 ranks do not fill ring:8/switch:4"),
        (8, "star", "topology 'star': 'star' is none of ring, ring:8"),
        (8, "ring:2x4", "'ring:2x4' is none of"),
        (8, "torus:8", "'torus:8' is none of"),
        (8, "ring:0", "'ring:0' is none of"),
        (8, "ring/switch", "ring needs a size, as another level follows: ring:8"),
        (0, None, "0 ranks: there must be 1 or more"),
    ]:
        with pytest.raises(InterconnectError, match=said):
            interconnect(chip(), n, topology)


def test_torus_and_mesh_without_numbers_are_as_square_as_it_gets() -> None:
    for n, sides in [(16, [4, 4]), (12, [4, 3]), (7, [7, 1])]:
        assert [each.size for each in interconnect(chip(), n, "torus").dimensions] == sides


def test_levels_have_the_links_of_the_chip_that_stand_for_them() -> None:
    second = '[[links]]\ntopology = "switch"\nbandwidth_bytes_per_s = 5e8\nlatency_ns = 9\nforwarding = "cut_through"\n'
    two = TEXT.replace("latency_ns = 500\n", "latency_ns = 500\nshape = [4]\n").replace(
        "[sources]", second + "[sources]"
    )
    network = interconnect(chips.read(two, "two.toml"), 8)
    assert way(network, 0, 6) == [0, 1, 2, 10, 6]
    assert [network.links[link].latency_ps for link in network.route(0, 6)] == [500_000, 500_000, 9_000, 9_000]
    assert network.hosts == (0, 0, 0, 0, 1, 1, 1, 1)
    assert network.text() == (
        "ring of 4, two directions, 1 GB/s a link, 500 ns a hop, store_and_forward; "
        "switch of 2, 0.5 GB/s a link, 9 ns a hop, cut_through"
    )


def test_rows_of_a_torus_are_hosts_to_algorithms_and_a_single_ring_has_none() -> None:
    assert interconnect(chip(), 8, "torus:4x2").hosts == (0, 0, 0, 0, 1, 1, 1, 1)
    assert interconnect(chip(), 8).hosts is None


def test_only_networks_in_which_ranks_can_be_renamed_rotate() -> None:
    rotating = {"ring", "switch", "full"}
    for topology in ("ring", "line", "switch", "full", "torus", "mesh", "ring:2/ring:4"):
        assert interconnect(chip(), 8, topology).rotates == (topology in rotating)
    assert not interconnect(chip(), 8, faults=["slow-link:0-1:0.9x"]).rotates
    for topology in rotating:  # links of a class stand together, in the order of ranks
        network = interconnect(chip(), 8, topology)
        for number in range(0, len(network.links), 8):
            ends = [(link.source, link.target) for link in network.links[number : number + 8]]
            assert {source if target == 8 else (target - source) % 8 for source, target in ends} in (
                *[{distance} for distance in range(1, 8)],
                set(range(8)),
            ) or {source for source, _ in ends} == {8}


def test_a_slow_link_is_slow_both_ways_and_a_dead_one_is_gone_round() -> None:
    network = interconnect(chip(), 8, faults=["slow-link:3-4:0.5x"])
    for ends, rate in {(3, 4): 5 * 10**8, (4, 3): 5 * 10**8, (4, 5): 10**9}.items():
        number = network.link(*ends)
        assert number is not None and network.links[number].bytes_per_s == rate
    dead = interconnect(chip(), 8, faults=["dead-link:3-4"])
    assert way(dead, 3, 4) == [3, 2, 1, 0, 7, 6, 5, 4]
    check_routes(dead)
    other_dimension = interconnect(chip(), 16, "torus:4x4", ["dead-link:0-1"])
    assert len(way(other_dimension, 0, 1)) == 4
    check_routes(other_dimension)
    assert interconnect(chip(), 8, faults=["dead-link:3-4"]).text().endswith("; dead link 3-4")


def test_ranks_that_a_dead_link_cuts_off_are_named() -> None:
    with pytest.raises(InterconnectError, match=r"rank 0 cannot reach rank 4: line of 8.*; dead link 3-4"):
        interconnect(chip(), 8, "line", ["dead-link:3-4"])
    with pytest.raises(InterconnectError, match=r"rank 0 cannot reach rank 3"):
        interconnect(chip(), 8, "switch", ["dead-link:3-8"])
    with pytest.raises(InterconnectError, match=r"there is no link 3-5: beside 3 are 2, 4"):
        interconnect(chip(), 8, faults=["dead-link:3-5"])
    with pytest.raises(InterconnectError, match=r"there is no link 9-5: there is no node 9"):
        interconnect(chip(), 8, faults=["dead-link:9-5"])


@pytest.mark.parametrize("text", ["slow-link:3-4", "dead-link:3", "slow-link:3-4:0x", "slow-link:3-4:-1x", "dead:3-4"])
def test_a_fault_that_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(InterconnectError, match=r"they are written slow-link:3-4:0\.5x"):
        parse_fault(text)


def test_networks_are_equal_where_times_are() -> None:
    assert interconnect(chip(), 8) == interconnect(chip(), 8, "ring:8") != interconnect(chip(), 8, "line")
    faulty = [interconnect(chip(), 8, faults=[fault]) for fault in ("slow-link:3-4:0.5x", "slow-link:3-4:0.6x")]
    bare = [Interconnect(8, each.links) for each in faulty]
    assert len({*faulty, *bare, *[Interconnect(8, each.links) for each in faulty], interconnect(chip(), 8)}) == 5


def test_links_alone_make_a_network_whose_messages_take_the_fewest_hops() -> None:
    ring = interconnect(chip(), 4)
    bare = Interconnect(2, ring.links)  # ranks 2 and 3 are chips of others
    assert way(bare, 0, 1) == [0, 1]
    assert not bare.rotates and bare.hosts is None
    only_down = Interconnect(2, ring.links[4:])
    assert way(only_down, 0, 1) == [0, 3, 2, 1]
    with pytest.raises(InterconnectError, match="rank 1 cannot reach rank 0: 2 ranks on 1 links"):
        Interconnect(2, ring.links[:1]).route(1, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["ring", "line", "switch", "full"]), st.integers(1, 4)), min_size=1, max_size=3)
)
def test_every_rank_reaches_every_other_on_any_nesting(levels: list[tuple[str, int]]) -> None:
    n = 1
    for _, size in levels:
        n *= size
    check_routes(interconnect(chip(), n, "/".join(f"{kind}:{size}" for kind, size in levels)))
