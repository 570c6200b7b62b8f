"""What a run is: every number that shapes it, read, checked, and chosen for this machine."""
