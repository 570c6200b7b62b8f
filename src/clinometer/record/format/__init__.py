"""What stands in a run file: tables, encodings, roll-ups; and what every reader and writer needs."""
