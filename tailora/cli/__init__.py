"""The command line: one file per command; each parses, calls the rooms below, and prints."""

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM
