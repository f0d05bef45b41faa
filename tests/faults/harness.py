"""The real command against a server of the tests' own, by means of the acceptance tests' harness."""

from tests.acceptance.harness import COMMAND, MANAGE, Commands, Finished, Running

# What only the transaction of a range sends. Others read the same table.
RANGE = b"INTO rotator_completedrange"


class Rotations(Commands):
    """Starts ``async_rotate`` with any DATABASE_URL, and ends what is left when the test is over."""

    def rotate(self, url: str, *options: str) -> Running:
        """Start it."""
        return self.start_on(url, *MANAGE, COMMAND, *options)

    def rotated(self, url: str, *options: str, seconds: float = 180.0) -> Finished:
        """Run it to its end."""
        return self.rotate(url, *options).wait(seconds)


def assert_completed(finished: Finished) -> None:
    """It ended as it should."""
    assert finished.status == 0, finished.err + finished.out
    assert finished.out.startswith("Completed: "), finished.out
