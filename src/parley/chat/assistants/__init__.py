"""Assistants: the built-in ones, and those that a workspace makes."""
