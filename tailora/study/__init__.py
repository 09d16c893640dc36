"""Questions about a run or several: plan, compare, search, inspect."""
