"""Reports in the browser and in the terminal.

A result -> `pages/*.py` -> a description of its page (`blocks.py`) -> `html.py` and `terminal.py`. `files.py` reads
report.json and writes report.html.
"""
