"""One frozen base in memory and many adapters: the registry of adapters, the server and its page."""
