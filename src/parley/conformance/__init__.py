"""Checks of any server that claims `parley.v1`, from outside: over its socket, its SSE and its REST, and nothing else.

Knows nothing of the service: the protocol's page is all that the two have in common.
"""
