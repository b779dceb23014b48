"""A backend of one's own: every operation goes through the store. Checks, hooks and the recorder come for free.

torchrun --nproc-per-node 2 examples/toy_backend.py
"""

import functools
import io

import torch
from torch.distributed import PrefixStore

import hxcomm.torchcomms as torchcomms
from hxcomm.torchcomms.hooks import FlightRecorderHook
from hxcomm.torchcomms.rendezvous import rank_and_size

REDUCTIONS = {"SUM": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum}


class StoreBackend(torchcomms.TorchCommBackend):
    def init(self, device, name, options):
        self._join(name, options.store, *rank_and_size())

    def _join(self, name, store, rank, size):
        self.name, self.store, self.rank, self.size, self.calls = name, store, rank, size, 0
        self.get_rank, self.get_size = lambda: rank, lambda: size
        self.get_backend_name, self.get_comm_name = lambda: "store", lambda: name

    def _exchange(self, tensor):
        """Every rank's tensor, in rank order."""
        self.calls += 1
        torch.save(tensor, data := io.BytesIO())
        self.store.set(f"{self.calls}/{self.rank}", data.getvalue())
        return [torch.load(io.BytesIO(self.store.get(f"{self.calls}/{rank}"))) for rank in range(self.size)]

    def all_reduce(self, tensor, op, async_op):
        if op.type.name not in REDUCTIONS:
            raise NotImplementedError(f"backend 'store' does not implement {op}")
        tensor.copy_(functools.reduce(REDUCTIONS[op.type.name], self._exchange(tensor)))

    def all_gather(self, tensor_list, tensor, async_op):
        for output, theirs in zip(tensor_list, self._exchange(tensor), strict=True):
            output.copy_(theirs)

    def broadcast(self, tensor, root, async_op):
        tensor.copy_(self._exchange(tensor)[root])

    def barrier(self, async_op):
        self._exchange(torch.empty(0))

    finalize = functools.partialmethod(barrier, False)  # no rank may take the store away while another reads it

    def split(self, ranks, name, options):
        if self.rank not in ranks:
            return None
        child = StoreBackend()
        child._join(name, PrefixStore(name, self.store), ranks.index(self.rank), len(ranks))
        return child


torchcomms.register_backend("store", StoreBackend)

if __name__ == "__main__":
    comm = torchcomms.new_comm("store", torch.device("cpu"), "toy")
    recorder = FlightRecorderHook()
    recorder.register_with_comm(comm)
    comm.all_reduce(total := torch.tensor([float(comm.get_rank() + 1)]), torchcomms.ReduceOp.SUM, async_op=False)
    print(f"rank {comm.get_rank()} of {comm.get_size()}: the sum is {total.item():g}, recorded: {recorder.size()} call")
    comm.finalize()
