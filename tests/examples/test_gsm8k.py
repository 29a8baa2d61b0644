"""The comparison on GSM8K: its data against hand-made runs, its statistics, and that it resumes."""
