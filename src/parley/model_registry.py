"""Every table, for Alembic only."""

from parley.chat import models as chat
from parley.identity import models as identity
from parley.realtime import models as realtime
from parley.tasks import models as tasks
from parley.tenancy import models as tenancy

__all__ = ["chat", "identity", "realtime", "tasks", "tenancy"]
