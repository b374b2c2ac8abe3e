"""Tool calls that wait until whoever asked says yes or no."""
