"""Rights, each scoped by tenant, and the principal on whose behalf the present call runs."""

import enum
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

Visible = Callable[[str], bool]
"""Whether what belongs to a tenant exists for who asks."""


class Right(enum.Enum):
    """What somebody may be allowed to do."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"
    """Events, traces and lists, without text."""
    READ_TEXT = "read_text"
    DELETE = "delete"
    METRICS = "metrics"
    """`/metrics`, which covers all tenants."""


def everyones(_: str) -> bool:
    """Visible: all of it exists, for what is not asked on behalf of anybody."""
    return True


EVERY_TENANT = "*"
NO_TEXT_RIGHT = "not_permitted"
"""`no_text_reason` of what is answered to a principal without the right to read its text."""


@dataclass(frozen=True)
class Principal:
    """Somebody who asks.

    Attributes:
        name: for the audit log.
        tenants: of each right, where it holds; EVERY_TENANT stands for all, those without a name included.
        anonymous: it has shown nothing, and a credential might give it more.
    """

    name: str
    tenants: Mapping[Right, frozenset[str]] = field(default_factory=dict)
    anonymous: bool = False

    def may(self, right: Right, tenant: str) -> bool:
        """Whether the right holds for what belongs to `tenant`; empty: to no tenant in particular."""
        held = self.tenants.get(right, frozenset())
        return EVERY_TENANT in held or (bool(tenant) and tenant in held)

    def sees(self, right: Right) -> Visible:
        """What exists for it when it makes use of a right."""
        return lambda tenant: self.may(right, tenant)

    def has(self, right: Right) -> bool:
        """Whether the right holds for any tenant."""
        return bool(self.tenants.get(right))

    @property
    def publishes_for(self) -> str:
        """The tenant to which all belongs that it publishes; empty: the engine says."""
        held = self.tenants.get(Right.PUBLISH, frozenset())
        return "" if EVERY_TENANT in held else next(iter(held), "")


def with_every_right(name: str) -> Principal:
    """Whoever connects, where no access file says more."""
    return Principal(name, {right: frozenset((EVERY_TENANT,)) for right in Right})


ANYBODY = with_every_right("anybody")

_current: ContextVar[Principal] = ContextVar("principal", default=ANYBODY)


def current() -> Principal:
    """On whose behalf the present task runs."""
    return _current.get()


def run_as(principal: Principal) -> None:
    """From now on the present task, and those it starts, run on behalf of `principal`."""
    _current.set(principal)
