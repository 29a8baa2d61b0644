"""From problems to step pairs: collect wrong solutions, localize their first wrong step, rectify it, build data."""
