"""A Llama-family decoder in plain PyTorch: what examples/tp_decode runs with weights and `hxcomm predict` without.

It is here, not in examples/, because both must be the same code, and what is installed has no examples. It knows
nothing of hxcomm: its collectives are those of whoever makes it (`model.Communication`).
"""
