"""Step-DPO (arXiv 2406.18629): the trainer, its configuration and the tokenization of step pairs."""
