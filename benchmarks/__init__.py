"""Load generators, and the provider that they and the tests talk to."""
