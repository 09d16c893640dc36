"""Proving what a server uses: the verification file (passport), the client that asks a server, and the verdict."""
