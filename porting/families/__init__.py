"""What is known of each family of models, one file a family."""
