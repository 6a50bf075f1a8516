"""The command `van-port`: parse, call one function, print, exit code."""
