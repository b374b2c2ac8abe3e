"""What can happen with tasks."""

from parley.core.errors import Conflict, NotFound


class TaskNotFound(NotFound):
    """No such task, or not the caller's."""

    code = "task_not_found"
    message = "No such task."


class TaskAmbiguous(Conflict):
    """A title stands for more than one task. `details.matches` lists some of them with their ids."""

    code = "task_ambiguous"
    message = "More than one open task matches. List the tasks and give the id of one."
