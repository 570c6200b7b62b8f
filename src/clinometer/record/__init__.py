"""The run file and what lies beside it: writer, reader, replays."""
