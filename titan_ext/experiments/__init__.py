"""Reproductions of papers on real text at a small size, each a ``titan-ext bench`` subcommand."""
