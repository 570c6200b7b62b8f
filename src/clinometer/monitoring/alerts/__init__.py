"""Rules that say when a run has trouble, and their words."""
