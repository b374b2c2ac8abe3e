"""Search of what was said, within what the caller may see."""
