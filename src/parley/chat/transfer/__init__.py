"""Conversations as files: exported, and imported from our own exports and those of other products."""
