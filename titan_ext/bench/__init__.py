"""Benchmarks: ``titan-ext bench NAME`` prints a table for people and, last, one line of JSON."""
