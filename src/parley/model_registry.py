"""Every table, for Alembic only."""

from parley.chat import models as chat
from parley.core import idempotency
from parley.identity import models as identity
from parley.jobs import models as jobs
from parley.realtime import models as realtime
from parley.tasks import models as tasks
from parley.tenancy import models as tenancy

__all__ = ["chat", "idempotency", "identity", "jobs", "realtime", "tasks", "tenancy"]
