"""How long the simulator takes: ring all_reduce of 8 and 4,096 chips, folded and event by event, pulled and pushed.

python scripts/bench_simulator.py
"""

from __future__ import annotations

import time

from hxcomm import algorithms
from hxcomm.sim import chips
from hxcomm.sim.engine import time_schedule
from hxcomm.sim.interconnect import interconnect


def main() -> None:
    lpu = chips.load("lpu")
    for push_only in (False, True):
        chip = chips.replace(lpu, "legal.push_only", push_only)
        for n, fold in ((8, False), (4096, True), (4096, False)):
            schedule, network = algorithms.build("all_reduce", "ring", n), interconnect(chip, n)
            begin = time.perf_counter()
            timing = time_schedule(schedule, chip, 64 << 20, network=network, fold=fold)
            seconds = time.perf_counter() - begin
            how = "pushed" if push_only else "pulled", "folded" if fold else "event by event"
            print(
                f"{n:>5} chips, {', '.join(how):<23}{seconds * 1e3:>9.1f} ms; simulated {timing.total_ps / 1e6:.1f} us"
            )


if __name__ == "__main__":
    main()
