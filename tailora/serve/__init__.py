"""One frozen base in memory and many adapters: engines, the registry of adapters, the server and its page."""
