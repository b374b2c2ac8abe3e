"""Live channels: the log in PostgreSQL, what is generated into it, and the socket that shows it."""
