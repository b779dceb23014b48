"""Virtual time: what a run on device hx would have cost on the chip that HXCOMM_SIM names.

The run itself stays what it is. Every op and collective of hx tensors also advances a clock of its rank, by what the
chip would have taken; `report()` tells the sums, `region("layer 3")` names what they are summed up by.

    HXCOMM_SIM=lpu torchrun --nproc-per-node 4 program.py
"""

from __future__ import annotations

from hxcomm.virtual.clock import Parts, Report, enter, is_running, now_ps, region, report

__all__ = ["Parts", "Report", "enter", "is_running", "now_ps", "region", "report"]
