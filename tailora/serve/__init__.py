"""One frozen base in memory and many adapters: engines, the server, its page, and proof of what a server uses."""
