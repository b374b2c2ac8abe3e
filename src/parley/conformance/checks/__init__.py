"""The checks, by section of the protocol."""
