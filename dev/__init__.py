"""Development commands of the pack: `python dev COMMAND`. Needs nothing but the standard library to start."""
