"""Runs that can be interrupted and resumed: run directories, logs of records, and the task scheduler."""
