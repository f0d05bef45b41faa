"""Which rows a rotation is for and who makes their values; it goes on with the same alone."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the user chose beside the fields, as it was written.

    Attributes:
        filters: Django lookups with their values, e.g. ``status=active``; rows match all of them.
        excludes: The same; rows match none of them.
        generator: The dotted path of what makes the values; empty for the fields' own defaults.
        include_null: Whether a NULL gets a value, too.
        include_blank: Whether an empty text gets a value, too.
        ignore_derived: The names of fields that derive nothing from the rotated ones, although it looks so.
            They change neither rows nor values, so a run can resume with others.
    """

    filters: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    generator: str = ""
    include_null: bool = False
    include_blank: bool = False
    ignore_derived: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_filtered(self) -> bool:
        """Whether some rows of the table are not rotated on purpose."""
        return bool(self.filters or self.excludes)

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Selection":
        """Return what :meth:`saved` was made of."""
        return cls(
            filters=tuple(saved.get("filters", ())),
            excludes=tuple(saved.get("excludes", ())),
            generator=saved.get("generator", ""),
            include_null=saved.get("include_null", False),
            include_blank=saved.get("include_blank", False),
            ignore_derived=tuple(saved.get("ignore_derived", ())),
        )

    def saved(self) -> dict[str, Any]:
        """Return it as JSON types, for the rotation's row."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the options that choose it; a phrase where there are none."""
        words = [word for text in self.filters for word in ("--filter", text)]
        words += [word for text in self.excludes for word in ("--exclude", text)]
        words += ["--generator", self.generator] if self.generator else []
        words += ["--include-null"] if self.include_null else []
        words += ["--include-blank"] if self.include_blank else []
        words += [word for name in self.ignore_derived for word in ("--ignore-derived", name)]
        return shlex.join(words) or "no filter and no generator"
