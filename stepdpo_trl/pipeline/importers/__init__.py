"""Readers of published datasets of labeled steps, one file per format."""
