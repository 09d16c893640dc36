"""Scripts that measure: `python -m benchmarks.ROOM.NAME` from the repository root. See README.md."""
