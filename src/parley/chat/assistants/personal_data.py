"""What assistants have of a person: that they made some."""

from parley.core.personal_data import OwnRows


class AssistantData(OwnRows):
    """The assistants that a person has made. Others talk with them: they stay, without their maker."""

    file = "assistants"
    exported = """
        SELECT id, row_to_json(a)::text AS row FROM (
            SELECT id, name, title, description, instructions, model, tools, approval, approval_tools, parameters,
                   version, created_at, updated_at
            FROM assistants WHERE workspace_id = $1 AND created_by = $2 AND id > $3 ORDER BY id LIMIT $4
        ) a ORDER BY id
    """
    erased = ("UPDATE assistants SET created_by = NULL WHERE workspace_id = $1 AND created_by = $2",)
