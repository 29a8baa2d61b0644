"""Shared prefixes: each token that sequences of a batch have in common is computed only once."""
