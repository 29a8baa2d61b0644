"""One file per judge, and the expressions that combine them."""
