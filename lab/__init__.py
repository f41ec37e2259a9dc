"""The lab: a small prior of the pack's own, its training recipe, its weights and the held-out protocol."""
