"""Any step of a run again, bit for bit."""
