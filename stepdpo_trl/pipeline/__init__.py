"""From problems to step pairs: collect wrong solutions, localize the first wrong step, rectify it, build data."""
