"""The command line. Parses arguments and calls the package."""
