"""Starts the sites of a run on this machine, watches them, and leaves nothing behind."""
