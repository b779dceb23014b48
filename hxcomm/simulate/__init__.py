"""`hxcomm simulate`: what a collective would cost on simulated chips and links, by algorithm and size.

    hxcomm simulate all_reduce --chips 64 --topology torus:8x8 --sizes 1KiB..1GiB

arguments: the command line, checked. sweep: what is timed. report: what is printed. command: runs it and writes files.
tuning: `hxcomm tune --chip`, the table of a simulated ring for HXCOMM_TUNING. Nothing here runs a collective.
"""
