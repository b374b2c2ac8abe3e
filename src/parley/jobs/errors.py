"""What can go wrong with jobs."""

from parley.core.errors import NotFound


class JobNotFound(NotFound):
    """No such job, or not the caller's."""

    message = "No such job."
