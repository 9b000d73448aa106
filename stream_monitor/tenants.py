"""Names of tenants: the people, teams or customers whose requests are kept apart from each other's."""

import re

MAX_CHARACTERS = 64
_NAME = re.compile(f"[A-Za-z0-9._-]{{0,{MAX_CHARACTERS}}}")


def check_tenant(value: str) -> str:
    """Return `value` if it names a tenant or is empty, else raise ValueError."""
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be at most {MAX_CHARACTERS} letters, digits, '.', '_' and '-'")
    return value
