"""Hugging Face transformers as its users write it: not one word of torch.distributed, nor of hxcomm.

    python examples/smollm2_folder.py smollm2             # or any folder of a Llama
    torchrun --nproc-per-node 3 examples/plain_transformers.py smollm2               # on 3 chips that hxcomm simulates
    HXCOMM_CPU=1 torchrun --nproc-per-node 3 examples/plain_transformers.py smollm2  # on CPU, through hxcomm
    python examples/plain_transformers.py smollm2         # one process

With HXCOMM_STATS=FOLDER, `hxcomm stats FOLDER` then shows which collectives went through hxcomm.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))

inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(tokens[0]))
