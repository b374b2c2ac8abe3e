"""The API of OpenAI, for clients that were written for it."""
