"""The server without a transport: tasks by name, requests checked and answered, what is counted."""
