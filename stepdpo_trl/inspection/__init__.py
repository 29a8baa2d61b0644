"""Show pairs and solutions step by step, with the log-probabilities of their tokens."""
