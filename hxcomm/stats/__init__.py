"""HXCOMM_STATS: what the collectives of each process have done, written by `recording` and shown by `report`."""
