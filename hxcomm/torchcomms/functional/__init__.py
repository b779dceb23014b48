"""torch.compile and autograd for communicators.

A function that calls `comm.all_reduce(...)` and the like compiles as one graph (`torch.compile(fullgraph=True)`), and
gradients flow through those that have one. This needs no import: stand_ins.py tells torch what to trace in place of
each method, and operators.py, the operators in the graph, is imported when the first one is traced. Outside of compiled
functions collectives carry no gradient, as in c10d; `import hxcomm.torchcomms.functional.collectives`, or
TORCHCOMMS_PATCH_FOR_COMPILE=1, makes them.
"""

from __future__ import annotations

from hxcomm import environment
from hxcomm.torchcomms.functional import stand_ins

stand_ins.register()
if environment.gives_eager_calls_gradients():
    from hxcomm.torchcomms.functional import collectives  # noqa: F401
