"""Ready-made hooks: a recorder of operations whose dumps torch's fr_trace reads, and a check for NaN."""

from hxcomm.torchcomms.hooks.flight_recorder import FlightRecorderHook
from hxcomm.torchcomms.hooks.nan_check import NanCheckHook, NanFoundError

__all__ = ["FlightRecorderHook", "NanCheckHook", "NanFoundError"]
