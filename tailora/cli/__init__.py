"""The command line: each command parses, calls the rooms below it and prints; related commands share a file."""
