"""Writes what a cluster's scheduler needs to run the sites of a file, and starts nothing."""
