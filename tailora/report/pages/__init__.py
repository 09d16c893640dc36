"""One file for each kind of page: a result -> the description of its page."""
