"""Every table, for Alembic only."""

from parley.chat import models as chat
from parley.chat.approvals import models as approvals
from parley.chat.assistants import models as assistants
from parley.chat.attachments import models as attachments
from parley.core import idempotency
from parley.identity import models as identity
from parley.jobs import models as jobs
from parley.llm import models as llm
from parley.realtime import models as realtime
from parley.tasks import models as tasks
from parley.tenancy import models as tenancy
from parley.usage import models as usage

__all__ = [
    "approvals", "assistants", "attachments", "chat", "idempotency", "identity", "jobs", "llm", "realtime", "tasks",
    "tenancy", "usage",
]  # fmt: skip
