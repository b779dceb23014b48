"""`hxcomm verify`: what torch.distributed promises, as checks that any c10d backend can be held against.

A check is a small function run by every rank (registry.py), given a Context (context.py). The driver (driver.py) keeps
ranks warm, gives each check a hard limit, and replaces ranks that hung, died or were left in doubt (pool.py). Nothing
here looks inside a backend, hxcomm's own included.
"""
