"""Worker processes, one per model replica, and the clients in the server process that talk to them."""
