"""Each token of a batch computed once, whatever sequences share it."""
