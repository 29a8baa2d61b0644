"""Judges that locate the first wrong step of a solution, one file per judge, and expressions that combine them."""
