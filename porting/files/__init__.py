"""Read and write checkpoints, weights files and other files."""
