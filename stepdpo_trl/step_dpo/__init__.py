"""The trainer (Step-DPO, arXiv 2406.18629)."""
