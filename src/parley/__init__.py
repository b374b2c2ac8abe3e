"""Parley: a self-hosted, multi-tenant backend for AI products."""
