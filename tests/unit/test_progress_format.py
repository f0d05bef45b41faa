import pytest

from rotator.progress import text as fmt


def test_counts_have_separators() -> None:
    assert fmt.count(1_000_000) == "1,000,000"
    assert fmt.plural(1, "row") == "1 row"
    assert fmt.plural(0, "row") == "0 rows"
    assert fmt.plural(2000, "row") == "2,000 rows"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.04, "0 s"),
        (0.4, "0.4 s"),
        (0.96, "1 s"),
        (3.2, "3 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599, "59 min 59 s"),
        (3599.7, "1 h 00 min"),
        (4320, "1 h 12 min"),
        (7199, "2 h 00 min"),
        (100_000, "27 h 47 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(
    ("rows_per_second", "text"),
    [(0, "0"), (0.32, "0.3"), (9.94, "9.9"), (999.6, "1,000"), (25_143, "25,100"), (1_234_567, "1,230,000")],
)
def test_rates(rows_per_second: float, text: str) -> None:
    assert fmt.rate(rows_per_second) == text


@pytest.mark.parametrize(
    ("number_of_bytes", "text"),
    [
        (0, "0 bytes"),
        (10239, "10239 bytes"),
        (10240, "10 kB"),
        (52_300_000, "50 MB"),
        (10_737_418_239, "10 GB"),
        (1_340_000_000, "1278 MB"),
    ],
)
def test_sizes(number_of_bytes: int, text: str) -> None:
    assert fmt.size(number_of_bytes) == text


def test_control_characters_and_line_ends_are_taken_out() -> None:
    assert fmt.one_line("a\x1b[2J\r\nb\tc") == "a [2J b c"
