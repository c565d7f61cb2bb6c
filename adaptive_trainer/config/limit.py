"""What `memory.limit` says: a size, a share of the device, no limit. No torch, so that a mistake is refused at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adaptive_trainer.errors import ConfigError

LEAST = 2 * 2**20  # bytes: `SMALL_SEGMENT` of the allocator
NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)")
UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
TOO_SMALL = f"less than the {LEAST // 2**20} MiB of the allocator's smallest segment, so that nothing fits"
SETTING = "memory.limit"
ALLOWED = (
    "allowed are a size (5600MiB, 6GiB, 512 MB), a fraction of the card above 0 and up to 1 (0.5), "
    "{}or none for no limit"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """`memory.limit`, understood. None of the first three set: the default.

    Attributes:
        name: what messages call it.
    """

    bytes: int | None = None
    fraction: float | None = None
    lifted: bool = False
    name: str = field(default=SETTING, compare=False)

    def of(self, total: int) -> int | None:
        """The limit in bytes on a device of `total` bytes; None where none is set.

        Raises:
            ConfigError: it is below one segment of the allocator.
        """
        if self.fraction is None:
            return self.bytes
        size = int(self.fraction * total)
        if size < LEAST:
            raise ConfigError(f"{self.name}={self.fraction:g} of {total / 2**20:.0f} MiB is {TOO_SMALL}; ask for more")
        return size


def parse_limit(value: object, name: str = SETTING) -> Limit:
    """Understand `memory.limit`: null, `none`, a size with its unit, whole bytes, or a fraction in (0, 1].

    Args:
        name: what messages call it.

    Raises:
        ConfigError: anything else, and sizes below one segment of the allocator (most likely a unit was forgotten).
    """
    text = value.strip().lower() if isinstance(value, str) else None
    allowed = ALLOWED.format("null for the default, " if name == SETTING else "")
    if value is None or text in ("", "null"):
        return Limit(name=name)
    if text == "none":
        return Limit(lifted=True, name=name)
    number, unit = None, ""
    if match := NUMBER.fullmatch(text or ""):
        number, unit = float(match[1]), match[2]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if number is None or unit not in ("", *UNITS):
        raise ConfigError(f"{name}={value!r} cannot be read; {allowed}")
    if not unit and 0 < number <= 1:
        return Limit(fraction=number, name=name)
    if not unit and not (number > 1 and number.is_integer()):
        raise ConfigError(f"{name}={value!r} is neither a size nor a fraction; {allowed}")
    size = number * UNITS[unit or "b"]
    if size < LEAST:
        what = "" if unit else f"{size:.0f} bytes, "  # who forgets a unit sees what the number means
        raise ConfigError(f"{name}={value!r} is {what}{TOO_SMALL}; a size has a unit, such as 5600MiB")
    return Limit(bytes=int(size), name=name)
