"""Schedules: collectives as data, and everything that can be done with one without moving a byte.

    schedule    what a Schedule is                     ops       what each collective means
    crossing    makes messages of what crosses hosts   symbolic  what every location holds meanwhile
    lowering    fits it to private or mapped memory
    compile     derives waits and makes a plan         plan      the plan's words
    prover      proves that it is right                extents   which elements a chunk is
    interpret   runs plans on numpy arrays (the oracle of the C++ executor; imported only on demand)
    draw        as text                                traffic   what crosses each hop of the ring

Imports no torch and, but for interpret, no numpy.
"""

from __future__ import annotations

from hxcomm.schedule.compile import compile_plan
from hxcomm.schedule.crossing import across_hosts, ranks_by_host
from hxcomm.schedule.errors import ProofError, ScheduleError
from hxcomm.schedule.lowering import lower
from hxcomm.schedule.ops import OPS, Layout
from hxcomm.schedule.plan import Plan
from hxcomm.schedule.prover import Proof, prove
from hxcomm.schedule.schedule import Location, Rotation, Round, Schedule, Transfer, copy, reduce
from hxcomm.schedule.traffic import ring_hop_bytes, ring_hop_chunks

__all__ = [
    "OPS",
    "Layout",
    "Location",
    "Plan",
    "Proof",
    "ProofError",
    "Rotation",
    "Round",
    "Schedule",
    "ScheduleError",
    "Transfer",
    "across_hosts",
    "compile_plan",
    "copy",
    "lower",
    "prove",
    "ranks_by_host",
    "reduce",
    "ring_hop_bytes",
    "ring_hop_chunks",
]
