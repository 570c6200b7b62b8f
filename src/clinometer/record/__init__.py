"""The run file: everything that was watched, in one SQLite file a run (docs/en/run-file.md)."""
