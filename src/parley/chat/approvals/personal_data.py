"""What approvals have of a person: the calls that were made for them, with their arguments."""

from parley.core.personal_data import OwnRows


class ApprovalData(OwnRows):
    """The tool calls that a person was asked about."""

    file = "tool_approvals"
    exported = """
        SELECT id, row_to_json(a)::text AS row FROM (
            SELECT id, reply_id, tool, arguments, approved, decided_by, decided_at, created_at, expires_at
            FROM tool_approvals WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
        ) a ORDER BY id
    """
    erased = ("DELETE FROM tool_approvals WHERE workspace_id = $1 AND user_id = $2",)
