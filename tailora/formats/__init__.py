"""Files: the PEFT adapter folder, written atomically and read strictly."""
