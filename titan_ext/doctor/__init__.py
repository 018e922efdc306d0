"""Checks of what surrounds a run before it starts: this machine, the timeouts, the lighthouse, the other sites."""
