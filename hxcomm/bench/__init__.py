"""The micro-benchmark of collectives: nccl-tests' columns, every result checked, peers and floors in the same run.

    torchrun --nproc-per-node 2 -m hxcomm.bench --compare gloo --floor

What it measures is what a program sees: each iteration writes the whole input and reads the whole output, and the time
of that alone is subtracted (up to 1 MiB; above, plain repetition). A loop that only repeats a collective never moves
the data out of the core that reduced it and flatters in-place algorithms 2 to 3 times. It measures any
torch.distributed backend by name, and knows nothing of how one works inside.
"""
