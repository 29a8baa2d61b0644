"""Work that survives a kill: run folders, records and the scheduler of tasks."""
