"""Work that must happen: an outbox in PostgreSQL, and who works it off."""
