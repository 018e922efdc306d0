"""Corpora: documents in files, of this interpreter, or streamed from a hub."""
