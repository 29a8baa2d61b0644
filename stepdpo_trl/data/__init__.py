"""Step-pair format, prompts, solution splitting and answer checking."""
