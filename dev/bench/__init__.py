"""Side-by-side measurements: each module is a command whose output is a table."""
