"""What can be wrong with a file that is to be imported."""

from parley.core.errors import Invalid


class NotAnExport(Invalid):
    """The file as a whole cannot be read."""

    code = "not_an_export"
    message = "This is no export: a conversations.json, a ZIP with one, or a conversation that was exported here."


class ItemRefused(Exception):
    """One conversation cannot be taken; the text says why and holds nothing of it."""
