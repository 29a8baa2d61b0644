"""Looking at a pair or a solution: its steps, their tokens, and what each is worth to policy and reference."""
