"""Reading and writing checkpoints, weights files and all else that lies on a disk."""
