"""Readers of published data sets of labeled steps, one file per format."""
