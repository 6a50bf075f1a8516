"""What the command line and Python users call: one file a task."""
