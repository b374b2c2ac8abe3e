"""What can happen with budgets."""

from parley.core.errors import Conflict, NotFound, RateLimited


class OverBudget(RateLimited):
    """A budget is used up. `retry_after_s` is how long its period still lasts."""

    code = "over_budget"
    frame_code = "over_budget"
    message = "A budget of this workspace is used up."


class BudgetNotFound(NotFound):
    """No such budget, or another workspace's."""

    message = "No such budget."


class UnknownSubject(NotFound):
    """A budget is to be for a user or an API key that the workspace does not have."""

    message = "This workspace has no such user or API key."


class BudgetTwice(Conflict):
    """Two budgets of a list are for the same subject and period."""

    code = "budget_twice"
    message = "Two of these budgets are for the same subject and period."
