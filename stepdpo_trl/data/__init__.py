"""The step-pair format, prompts, and reading solutions and answers."""
