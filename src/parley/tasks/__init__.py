"""Tasks: the first domain module, and the pattern for the next one."""
