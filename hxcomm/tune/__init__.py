"""Measures which algorithm and window is fastest where it runs, and writes the table that HXCOMM_TUNING names.

    torchrun --nproc-per-node 4 -m hxcomm.tune --out table.json

On one host `hxcomm tune --ranks 4 --out table.json` starts the ranks itself. What is timed is what hxcomm.bench times:
each iteration writes the whole input and reads the whole output.
"""
