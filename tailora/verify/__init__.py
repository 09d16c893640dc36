"""Proving what a server uses: the verification file, the client that asks a server, and the verdict."""
