"""Workspaces and who belongs to them: the tenant that every other table hangs on."""
