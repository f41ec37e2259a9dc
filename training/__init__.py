"""Everything that learns: paired data, objectives, the one training loop and its checkpoints."""
