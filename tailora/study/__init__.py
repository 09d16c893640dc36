"""Questions that take several runs: compare, search."""
