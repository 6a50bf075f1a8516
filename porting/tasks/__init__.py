"""The tasks that the command line and Python users call, one file each."""
