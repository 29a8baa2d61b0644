"""Command line: parsing of arguments and calls of the package."""
