"""What the tests of vLLM ask of its workers: vLLM imports it there and adds the class to its own."""

from __future__ import annotations

from collections import Counter


class Workers:
    """A `worker_extension_cls` of vLLM."""

    def communication(self) -> tuple[list[str], dict[str, int]]:
        """Platform, communicator and backend of tensor parallelism; how often each collective of hxcomm has run."""
        import torch.distributed as dist
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.platforms import current_platform

        import hxcomm

        counted: Counter[str] = Counter()
        for row in hxcomm.statistics():
            counted[row["op"]] += row["calls"]
        group = get_tp_group()
        names = [type(current_platform).__name__, type(group.device_communicator).__name__]
        return [*names, dist.get_backend(group.device_group)], dict(counted)
