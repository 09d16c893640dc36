"""Whether it worked: held-out loss with intervals, and answers side by side."""
