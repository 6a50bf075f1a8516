"""The command line, `van-port`: each command parses its options, calls one task, prints and sets the exit code."""
