"""What this module has of a person: the tasks."""

from parley.core.personal_data import OwnRows


class TaskData(OwnRows):
    """The tasks of a person."""

    file = "tasks"
    exported = """
        SELECT id, row_to_json(t)::text AS row FROM (
            SELECT id, user_id, title, description, completed, due_at, created_at, updated_at
            FROM tasks WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
        ) t ORDER BY id
    """
    erased = ("DELETE FROM tasks WHERE workspace_id = $1 AND user_id = $2",)
