"""Corpora behind URLs: listed where they are, read from copies in a local folder of bounded size."""
