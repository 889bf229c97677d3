"""What a run does beside its task: seeds, progress, checkpoints, averages, pictures, reports."""
