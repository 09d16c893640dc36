"""The command line: each command parses, calls the rooms that it stands on, and prints; related commands share a file."""
