"""The preflight's screen, and the WAL that it expects."""

from dataclasses import replace

from rotator.events import Findings, Index, Sample, ServerFindings, TableFindings
from rotator.progress.preflight import estimate_wal, preflight

GIGABYTE = 1 << 30
TABLE = TableFindings(
    rows=1_000_000,
    rows_is_exact=True,
    heap_bytes=77_000_000,
    indexes=(
        Index(name="ticket_token_key", size_bytes=40_000_000, holds_column=True),
        Index(name="ticket_pkey", size_bytes=22_000_000, holds_column=False),
    ),
    triggers=(),
)
SERVER = ServerFindings(
    max_wal_size_bytes=8 * GIGABYTE,
    checkpoint_timeout_seconds=1800,
    full_page_writes=True,
    archiving="",
    replicas=(),
    slots=(),
    holders=(),
    log_settings=(),
)
FINDINGS = Findings(
    target="shop.Order.api_key",
    database="default",
    server_name="app@db1:5432/shop",
    table_name="public.shop_order",
    concurrency=4,
    rows_left=1_000_000,
    unfinished=None,
    table=TABLE,
    server=SERVER,
    sample=Sample(rows=30_000, rows_per_second=200_000),
    bypassed=(),
)


def test_it_is_one_screen() -> None:
    lines = preflight(FINDINGS).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
    assert lines[:5] == [
        "Before the first write to shop.Order.api_key in the database 'default':",
        "  server       app@db1:5432/shop",
        "  rows         1,000,000 counted",
        "  table        public.shop_order: 73 MB, indexes 59 MB",
        "  indexes      each update writes to all 2: ticket_token_key 38 MB, ticket_pkey 21 MB",
    ]
    (time,) = (line for line in lines if line.startswith("  time "))
    assert time.endswith(
        " about 5 s with 4 workers: 30,000 rows were rewritten at 200,000 rows/s and rolled back"
    )


def test_an_estimated_count_and_a_rotation_that_is_resumed() -> None:
    findings = replace(
        FINDINGS, table=replace(TABLE, rows_is_exact=False), unfinished=7, rows_left=300_000, sample=Sample()
    )
    text = preflight(findings)
    assert "about 1,000,000 (estimate); rotation 7 resumes, with about 300,000 left" in text
    assert "not measured; --dry-run without --no-sample measures it" in text
    assert findings.estimated_seconds is None


def test_what_was_chosen_is_shown() -> None:
    text = preflight(replace(FINDINGS, selection="--filter status=active --generator shop.keys.make"))
    assert "  chosen by    --filter status=active --generator shop.keys.make" in text
    assert "chosen by" not in preflight(FINDINGS)


def test_what_should_not_be_is_hard_to_miss() -> None:
    server = replace(
        SERVER,
        replicas=("standby1 (async, 12 MB behind)", "standby2 (sync, 0 bytes behind)"),
        slots=("forgotten (NOT ACTIVE, keeps 3 GB)",),
        holders=("pid 123, since 02:10:00 UTC",),
        archiving="last archived 00:10:00 ago, FAILING since 02:00:00 UTC",
        log_settings=("log_statement = all",),
    )
    text = preflight(
        replace(
            FINDINGS,
            server=server,
            table=replace(TABLE, triggers=("audit",), skipped_triggers=("checksum",)),
            bypassed=("updated_at (auto_now) stays as it is",),
        )
    )
    for phrase in (
        "replicas     standby1 (async, 12 MB behind)\n               standby2 (sync, 0 bytes behind)",
        "forgotten (NOT ACTIVE, keeps 3 GB)",
        "blocked by pid 123, since 02:10:00 UTC",
        "FAILING since",
        "WILL SHOW new values (log_statement = all)",
        "each update fires audit",
        "warning      session_replication_role is replica: updates do not fire checksum",
        "updated_at (auto_now) stays as it is",
    ):
        assert phrase in text


def test_many_indexes_are_named_below_each_other_and_the_smallest_only_counted() -> None:
    indexes = tuple(Index(name=f"index_{n}", size_bytes=1000, holds_column=True) for n in range(30))
    text = preflight(replace(FINDINGS, table=replace(TABLE, indexes=indexes)))
    assert "each update writes to all 30:" in text
    assert "index_3 1000 bytes\n" in text
    assert "26 more" in text
    assert "index_4" not in text


def test_a_column_without_an_index_may_leave_them_alone() -> None:
    bare = replace(TABLE, indexes=(Index(name="ticket_pkey", size_bytes=22_000_000, holds_column=False),))
    assert "not updated where the page has room" in preflight(replace(FINDINGS, table=bare))
    assert estimate_wal(bare, SERVER, 1_000_000).wal_bytes < estimate_wal(TABLE, SERVER, 1_000_000).wal_bytes


def test_wal_that_fits_forces_no_checkpoint() -> None:
    wal = estimate_wal(TABLE, SERVER, 1_000_000)
    # benchmarks/speed.py found 480 bytes a row.
    assert 400 < wal.wal_bytes / 1_000_000 < 600
    assert wal.forced_checkpoints == 0
    assert "no checkpoint is forced" in preflight(FINDINGS)


def test_small_max_wal_size_multiplies_the_wal_of_a_large_table() -> None:
    large = replace(
        TABLE,
        rows=10_000_000,
        heap_bytes=770_000_000,
        indexes=tuple(replace(index, size_bytes=10 * index.size_bytes) for index in TABLE.indexes),
    )
    wal = estimate_wal(large, replace(SERVER, max_wal_size_bytes=GIGABYTE), 10_000_000)
    # Measured before the first line of this software: 21 GB instead of 5.3.
    assert 14e9 < wal.wal_bytes < 28e9
    assert wal.forced_checkpoints > 10
    assert 4e9 < wal.calm_bytes < 6e9


def test_wal_never_exceeds_a_page_for_each_new_value() -> None:
    wal = estimate_wal(TABLE, replace(SERVER, max_wal_size_bytes=GIGABYTE // 64), 1_000_000)
    assert wal.wal_bytes < 1_000_000 * (8192 + 1000)
    assert estimate_wal(TABLE, replace(SERVER, full_page_writes=False), 1000).wal_bytes < 1000 * 500
    assert estimate_wal(replace(TABLE, rows=0), SERVER, 0).wal_bytes == 0


def test_a_proof_and_its_guard_are_announced() -> None:
    text = preflight(replace(FINDINGS, proves=True, guard="keep"))
    assert "  ledger       about 56 MB, which is loaded before the first row" in text.splitlines()
    assert "  guard        a trigger is added: an update with an old value keeps the newer one" in text
    assert "ledger" not in preflight(FINDINGS)
