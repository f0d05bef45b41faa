"""The one way in which the embedded server fails."""

from django.db.utils import OperationalError


class EmbeddedServerError(OperationalError):
    """The embedded server cannot be used; its text is one sentence that says what to do."""
