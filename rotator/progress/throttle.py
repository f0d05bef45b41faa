"""Speaking at most every so often."""


class Throttle:
    """Says whether it is time again; ``now`` is a monotonic clock's value in seconds."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds = seconds
        self._due_at = now + seconds

    def due(self, now: float) -> bool:
        """Return whether ``seconds`` have passed since it last said yes, or since it was made."""
        if now < self._due_at:
            return False
        self._due_at = now + self._seconds
        return True
