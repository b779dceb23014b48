"""The simulator: what a Schedule, or a whole run, would cost on chips that are described in a file of 30 lines.

    chips           what a chip is, read from TOML          interconnect  who is linked to whom, and by which way
    program         a Schedule as a chip is given it        engine        when everything happens, in picoseconds
    legality        what the links can execute              choosing      the fastest legal algorithm

Times are integers of picoseconds and rates exact fractions, so equal inputs give equal results everywhere. The inner
loop is C++ (csrc/simulation). Imports neither torch nor sockets.
"""
