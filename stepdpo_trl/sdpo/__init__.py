"""Stages with a moving reference (sDPO, arXiv 2403.19270)."""
