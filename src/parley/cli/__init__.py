"""The command `parley`: what an operator or a user does from a terminal."""

from parley.cli.app import main

__all__ = ["main"]
