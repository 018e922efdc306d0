"""Tokenizers, and the vocabularies that sites use of them."""
