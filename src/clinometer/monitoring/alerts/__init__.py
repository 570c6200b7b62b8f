"""Rules that decide when a run has trouble, and the alerts they open."""
