"""Adapter files: the PEFT folder, other formats that are read, and exports. peft.py and load.py come first."""
