"""The lessons: pages of docs/<language>/lessons, read, run in a terminal and written as notebooks."""
