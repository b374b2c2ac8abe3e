"""What this module has of a person: which calls of models were made for them."""

from contextlib import AbstractAsyncContextManager
from uuid import UUID

from parley.core.db import Database, UnitOfWork
from parley.core.personal_data import OwnRows, Person


class UsageData(OwnRows):
    """The ledger's rows of a person. Budgets of theirs go with their membership.

    The figures are the workspace's books and stay; whose calls they were is forgotten, with the keys that would tell.
    """

    file = "usage"
    exported = """
        SELECT id, row_to_json(u)::text AS row FROM (
            SELECT id, workspace_id, key_id, conversation_id, message_id, purpose, provider, model, attempt, status,
                   error, input_tokens, cached_tokens, output_tokens, images, estimated, own_key, cost::text AS cost,
                   started_at, ended_at
            FROM usage_entries WHERE workspace_id = $1 AND user_id = $2 AND id > $3 ORDER BY id LIMIT $4
        ) u ORDER BY id
    """
    erased = (
        "UPDATE usage_entries SET user_id = NULL, key_id = NULL WHERE workspace_id = $1 AND user_id = $2",
        """
        UPDATE usage_reservations SET user_id = NULL, key_id = NULL, expires_at = coalesce(expires_at, now())
        WHERE workspace_id = $1 AND user_id = $2
        """,
    )

    def _unit(self, database: Database, person: Person, workspace_id: UUID) -> AbstractAsyncContextManager[UnitOfWork]:  # noqa: ARG002 - as it is called
        # The app's role adds to the ledger and changes nothing in it.
        return database.system_unit_of_work()
