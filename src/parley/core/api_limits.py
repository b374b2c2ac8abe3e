"""The limits of every authenticated request, and of credentials that do not hold."""

from ipaddress import IPv6Address, ip_address

from parley.core.rate_limits import Limit, RateLimits, Room
from parley.core.scope import Scope
from parley.core.settings import LimitSettings

_MINUTE_S = 60


def network_of(address: str | None) -> str:
    """Return what counts as one place: an IPv4 address, the /64 of an IPv6 one."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return address or "-"
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(IPv6Address(int(parsed) >> 64 << 64)) + "/64"
    return str(parsed)


class ApiLimits:
    """Counts requests by user or key and by workspace, failed credentials and handshakes by address."""

    def __init__(self, rates: RateLimits, settings: LimitSettings) -> None:
        self._rates = rates
        self.enabled = rates.enabled
        self._user = Limit("user", settings.api_per_minute, _MINUTE_S)
        self._key = Limit("key", settings.key_per_minute, _MINUTE_S)
        self._workspace = Limit("workspace", settings.workspace_per_minute, _MINUTE_S)
        self._unverified = Limit("unverified", settings.unverified_per_minute, _MINUTE_S)
        self._handshakes = Limit("handshakes", settings.handshakes_per_minute, _MINUTE_S)
        self._sends = Limit("sends", settings.sends_per_minute, _MINUTE_S)
        self.running_replies = settings.running_replies

    async def before_verifying(self, address: str | None) -> None:
        """Raise `TooMany` where too many credentials came that did not hold: another random one changes nothing."""
        if self.enabled:
            await self._rates.require(self._unverified, network_of(address))

    async def refused(self, address: str | None) -> None:
        """Count a credential that did not hold. Raises `TooMany`."""
        if self.enabled:
            await self._rates.hit(self._unverified, network_of(address))

    async def request(self, scope: Scope) -> Room | None:
        """Count a request of a verified caller, and return what is left for it. Raises `TooMany`."""
        if not self.enabled:
            return None
        workspace = str(scope.workspace_id)
        await self._rates.hit(self._workspace, workspace)
        if scope.key_id is not None:
            return await self._rates.hit(self._key, workspace, str(scope.key_id))
        # By user and not by workspace: who has many has no more.
        return await self._rates.hit(self._user, str(scope.user_id))

    async def handshake(self, address: str | None) -> None:
        """Count the opening of a socket. Raises `TooMany`."""
        if self.enabled:
            await self._rates.hit(self._handshakes, network_of(address))

    async def send(self, scope: Scope) -> None:
        """Count a message. Raises `TooMany`."""
        if self.enabled:
            await self._rates.hit(self._sends, str(scope.user_id))
