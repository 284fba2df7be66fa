"""Files: pictures, checkpoints, results."""
