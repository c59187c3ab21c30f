"""The command line: one module per kind of thing a command works on; the only rooms that print."""
