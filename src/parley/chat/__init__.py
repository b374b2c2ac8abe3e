"""Conversations with models: messages, replies, tools."""
