"""Rehearsals in real time: the run's own processes on this machine, with links and faults between its sites."""
