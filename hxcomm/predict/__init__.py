"""`hxcomm predict`: what decoding a model would cost on chips, without weights and without chips.

    hxcomm predict --model llama-2-70b --chip lpu --ranks 1,2,4,8 --context 2048

The model's own code runs on torch's meta device, where tensors have shapes and no memory, and every op is recorded
(recording.py). The records are timed by the chip's rates and the collectives by the simulated links (timing.py), so a
prediction knows nothing of a model but its code, and nothing of a chip but its file.
"""
