"""The server: its API, its deployment, keys, and users' preferences."""
