"""The project's setting ``ROTATOR``, checked wherever it is read: commands run without Django's checks."""

from collections.abc import Mapping
from typing import Final

from django.conf import settings

from rotator.errors import OptionError

KEYS: Final = ("DEFAULT_TARGET", "CELERY_APP")


def read_setting() -> Mapping[str, str]:
    """Return the setting; empty where the project has none.

    Raises:
        OptionError: It is no dictionary of texts, or has a key that there is not.
    """
    setting: object = getattr(settings, "ROTATOR", {})
    if not isinstance(setting, dict):
        raise OptionError("The setting ROTATOR is no dictionary.")
    unknown = sorted(str(key) for key in setting if key not in KEYS)
    if unknown:
        raise OptionError(
            f"The setting ROTATOR has no key {', '.join(unknown)}: there are {' and '.join(KEYS)}."
        )
    for key, value in setting.items():
        if not isinstance(value, str):
            raise OptionError(f'ROTATOR["{key}"] is no text.')
    return setting
