"""Sources of checkpoints: the table of published files, downloads, and the Hugging Face hub."""
