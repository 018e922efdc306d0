"""A rehearsal of a run on one machine: its links, faults and outer loop, without its model; ``titan-ext lab``."""
