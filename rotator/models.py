"""The tables of the rotator, with the constraints that its SQL relies on."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import ClassVar, Final

from django.db import models, transaction
from django.db.models import F, Q, Value
from django.db.models.functions import Now

from rotator.events import ActionKind
from rotator.exceptions import RevisionError
from rotator.options import RunOptions, Selection
from rotator.postgres.owner import SILENT_SECONDS, Owner
from rotator.stats import percent_of

_JUST_ENDED_SECONDS: Final = 3.0
_UNFINISHED: Final = ("running", "queued", "interrupted", "failed")


class Rotation(models.Model):
    """A rotation of one target, from its start to its completion, over all of its runs.

    Transitions::

        running      -> completed | queued | interrupted | failed | abandoned
        queued       -> running | abandoned
        interrupted  -> running | abandoned
        failed       -> running | abandoned
    """

    UNFINISHED: ClassVar = _UNFINISHED

    class Status(models.TextChoices):
        """The state of a rotation; a run resumes one in any of the first four states."""

        RUNNING = "running"
        QUEUED = "queued"
        INTERRUPTED = "interrupted"
        FAILED = "failed"
        COMPLETED = "completed"
        ABANDONED = "abandoned"

    target = models.TextField(
        help_text="As the user writes it: app.Model.field, several with blanks between."
    )
    table_name = models.TextField(
        default="", help_text="The target's table with its schema, quoted, as the server has it."
    )
    database = models.CharField(
        max_length=255, help_text="Django's alias of the target's database in the latest run."
    )
    bound = models.JSONField(
        null=True, help_text="The upper key bound, frozen at the start; null where empty."
    )
    started_xid = models.BigIntegerField(
        help_text="The transaction that began it (xid8): rows with an older xmin have not been written since."
    )
    options = models.JSONField(default=dict, help_text="The options of the latest run.")
    selection = models.JSONField(
        default=dict, help_text="The rows and the source of their values, the same for all runs."
    )
    identity = models.JSONField(
        default=dict, help_text="The server, database, table, key and files at its start."
    )
    status = models.CharField(max_length=16, choices=Status, default=Status.RUNNING)
    generation = models.BigIntegerField(default=1, help_text="Fences out an older process of this rotation.")
    active_seconds = models.FloatField(default=0.0, help_text="Time spent over all runs.")
    rows_total = models.BigIntegerField(default=0)
    rows_total_is_exact = models.BooleanField(default=True)
    rows_done = models.BigIntegerField(default=0)
    late_rows = models.BigIntegerField(
        default=0, help_text="Rows that were committed late and rotated outside the ranges."
    )
    unconfirmed_rows = models.BigIntegerField(
        null=True,
        help_text="Rows that other sessions or triggers wrote last, counted at completion.",
    )
    deferrals = models.BigIntegerField(
        default=0, db_default=0, help_text="How often a range was deferred because of locks, over all runs."
    )
    retries = models.BigIntegerField(
        default=0, db_default=0, help_text="How often a range was retried after an error, over all runs."
    )
    throttled_seconds = models.FloatField(
        default=0.0, db_default=0.0, help_text="The time in which throttles held the rotation, over all runs."
    )
    throttle_reason = models.TextField(
        default="",
        db_default="",
        blank=True,
        help_text="What holds the rotation now, except for a pause; empty where nothing does.",
    )
    throttled_since = models.DateTimeField(null=True, help_text="The time since which it is held.")
    applied_revision = models.BigIntegerField(
        default=0, db_default=0, help_text="The revision of the control row that the owner has applied."
    )
    applied_at = models.DateTimeField(null=True, help_text="The time at which the owner applied it.")
    started_at = models.DateTimeField(db_default=Now())
    updated_at = models.DateTimeField(db_default=Now(), help_text="The owner's heartbeat.")
    finished_at = models.DateTimeField(null=True)
    owner_host = models.CharField(max_length=255, default="", blank=True)
    owner_pid = models.BigIntegerField(null=True)
    owner_process = models.CharField(
        max_length=255,
        default="",
        blank=True,
        help_text="Identifies the process on its host, even if another one gets its pid.",
    )
    owner_user = models.CharField(max_length=255, default="", blank=True)
    owned_since = models.DateTimeField(db_default=Now())
    version = models.CharField(max_length=32, help_text="The version of this software that ran last.")
    stop_reason = models.CharField(
        max_length=64,
        default="",
        db_default="",
        blank=True,
        help_text="The reason of a stop that was requested.",
    )
    error = models.TextField(default="", blank=True, help_text="One sentence, never a value of the column.")
    findings = models.JSONField(
        null=True, help_text="The findings of the preflight; null where there was none."
    )
    rejected_keys = models.JSONField(
        db_default=Value([], output_field=models.JSONField()),
        help_text="The keys of rows that the server rejected in the latest run, with the reason.",
    )

    class Meta:
        permissions: ClassVar = [("control_rotation", "Can pause, resume, cancel and change rotations")]

        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["target", "table_name"],
                condition=Q(status__in=_UNFINISHED),
                name="rotator_one_unfinished_rotation",
            ),
            models.CheckConstraint(
                condition=Q(status__in=[*_UNFINISHED, "completed", "abandoned"]),
                name="rotator_rotation_status_known",
            ),
            models.CheckConstraint(
                condition=Q(status__in=_UNFINISHED, finished_at__isnull=True)
                | Q(status__in=["completed", "abandoned"], finished_at__isnull=False),
                name="rotator_rotation_finished_at_its_end",
            ),
            models.CheckConstraint(
                condition=Q(
                    generation__gte=1,
                    active_seconds__gte=0,
                    rows_total__gte=0,
                    rows_done__gte=0,
                    late_rows__gte=0,
                    deferrals__gte=0,
                    retries__gte=0,
                    throttled_seconds__gte=0,
                ),
                name="rotator_rotation_figures_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"rotation {self.pk} of {self.target}"

    @property
    def is_filtered(self) -> bool:
        """Whether options exclude some rows of the table."""
        return Selection.from_json(self.selection).is_filtered

    @property
    def is_unfinished(self) -> bool:
        """Whether the same command resumes it."""
        return self.status in _UNFINISHED

    @property
    def is_active(self) -> bool:
        """Whether a process works on it, or Celery workers will, by its status alone."""
        return self.status in (self.Status.RUNNING, self.Status.QUEUED)

    @property
    def control_row(self) -> "Control":
        """The requests of users; an empty row where there are none."""
        return getattr(self, "control", None) or Control(rotation=self)

    @property
    def ledger_row(self) -> "Ledger | None":
        """The ledger, forgotten or not; None where it never had one."""
        return getattr(self, "ledger", None)

    @property
    def owner(self) -> Owner:
        """The process that owns it, or the last one that did."""
        return Owner(
            host=self.owner_host,
            pid=self.owner_pid or 0,
            process=self.owner_process,
            user=self.owner_user,
            version=self.version,
        )

    @property
    def silent_seconds(self) -> float:
        """The time since the last heartbeat on the database's clock, as ``find_rotations()`` has read it."""
        return max(0.0, float(vars(self)["silence"]))

    @property
    def read_at(self) -> datetime:
        """The time at which ``find_rotations()`` has read it, on the database's clock."""
        return self.updated_at + timedelta(seconds=self.silent_seconds)

    @property
    def is_silent(self) -> bool:
        """Whether it runs, and its owner sends no heartbeat."""
        return self.status == self.Status.RUNNING and self.silent_seconds > SILENT_SECONDS

    @property
    def is_dead(self) -> bool:
        """Whether it runs, and its owner has ended, or is silent for too long."""
        # A process that has just ended may have completed the rotation after it was read.
        if self.status != self.Status.RUNNING or self.silent_seconds < _JUST_ENDED_SECONDS:
            return False
        budget_seconds = RunOptions.from_json(self.options).outage_budget_seconds
        return self.owner.is_gone() or self.silent_seconds > budget_seconds + SILENT_SECONDS

    @property
    def has_owner(self) -> bool:
        """Whether a process works on it, or Celery workers will."""
        return self.is_active and not self.is_silent and not self.is_dead

    @property
    def held_by(self) -> str:
        """What holds it while it runs; empty where nothing does."""
        if self.status != self.Status.RUNNING:
            return ""
        control = self.control_row
        paused = f"paused by {control.paused_by}" if control.paused else ""
        return "; ".join(filter(None, [paused, self.throttle_reason]))

    @property
    def percent(self) -> int:
        """The percentage of rows done, rounded down."""
        if self.status == self.Status.COMPLETED:
            return 100
        if self.bound is None and not self.rows_total:
            # The rows are not counted yet.
            return 0
        return percent_of(self.rows_done, self.rows_total, is_exact=self.rows_total_is_exact)


class Span(models.Model):
    """A part of a rotation's keys, planned by the owner; one helper at a time works on it.

    The owner deletes it when it is finished. Only the checkpoints record which rows are completed.
    """

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="spans")
    after = models.JSONField(null=True, help_text="The last key before the span; null at the table's start.")
    through = models.JSONField(help_text="The span's last key.")
    checkpoints_before = models.BigIntegerField(help_text="The latest checkpoint's id when it was planned.")
    generation = models.BigIntegerField(default=0, help_text="Fences out an earlier helper of this span.")
    worker = models.CharField(max_length=255, default="", blank=True, help_text="The helper's host and pid.")
    lease_expires_at = models.DateTimeField(
        null=True, help_text="The time at which another helper can claim it; null where it is not claimed."
    )
    deferrals = models.BigIntegerField(default=0)
    retries = models.BigIntegerField(default=0)
    failed_keys = models.JSONField(default=list, help_text="Keys that could not be rotated, with the reason.")
    finished_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"({self.after or 'start'}, {self.through}]"


class Helper(models.Model):
    """A Celery message that asks for help with a rotation, or the task that has received one.

    A message is valid while its row exists. The task that receives it replaces the row by its own.
    """

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="helpers")
    sent_at = models.DateTimeField(null=True, help_text="The time of the message; null until it is sent.")
    expires_at = models.DateTimeField(
        null=True, help_text="The time until which the task is alive; null for a message."
    )
    error = models.TextField(default="", blank=True, help_text="One sentence, never a value of the column.")

    def __str__(self) -> str:
        return f"helper {self.pk}"


class CompletedRange(models.Model):
    """A checkpoint: a completed range, committed in the same transaction as its rows."""

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="completed_ranges")
    after = models.JSONField(null=True, help_text="The last key before the range; null at the table's start.")
    through = models.JSONField(help_text="The range's last key.")
    rows = models.BigIntegerField()
    seconds = models.FloatField()
    xid = models.BigIntegerField(
        null=True, help_text="The transaction (xid8); null where an older version wrote the range."
    )
    has_other_writes = models.BooleanField(
        db_default=False, help_text="Whether a trigger wrote other rows of the table in the same transaction."
    )
    committed_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["rotation", "after"], nulls_distinct=False, name="rotator_range_begins_once"
            ),
            models.UniqueConstraint(fields=["rotation", "through"], name="rotator_range_ends_once"),
            models.CheckConstraint(
                condition=Q(after__isnull=True) | ~Q(after=F("through")), name="rotator_range_not_empty"
            ),
            models.CheckConstraint(
                condition=Q(rows__gte=0, seconds__gte=0), name="rotator_range_figures_not_negative"
            ),
        ]

    def __str__(self) -> str:
        return f"({self.after or 'start'}, {self.through}]"


class LateTransaction(models.Model):
    """A transaction that rotated rows that no range had written, e.g. because they were committed late."""

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="late_transactions")
    xid = models.BigIntegerField(help_text="The transaction (xid8).")
    rows = models.BigIntegerField()
    committed_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"transaction {self.xid}"


class Control(models.Model):
    """The requests of users to the owner and the helpers of a rotation, which read it once a second.

    Only users write it. The owner writes what it has applied to the rotation's row, so a session that locks
    this row never stops the heartbeat.
    """

    rotation = models.OneToOneField(
        Rotation, on_delete=models.CASCADE, primary_key=True, related_name="control"
    )
    revision = models.BigIntegerField(default=0, help_text="Increased by each change.")
    paused = models.BooleanField(default=False)
    paused_by = models.CharField(max_length=255, default="", blank=True)
    pace = models.CharField(max_length=16, default="", blank=True, help_text="Empty for that of the run.")
    concurrency = models.IntegerField(null=True, help_text="The most workers; null for that of the run.")
    batch = models.IntegerField(null=True, help_text="The most rows in a range; null for that of the run.")
    cancel_revision = models.BigIntegerField(
        null=True, help_text="The revision that asks the owner of that time to stop; null where none does."
    )
    cancelled_by = models.CharField(max_length=255, default="", blank=True)
    changed_by = models.CharField(max_length=255, default="", blank=True)
    changed_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"revision {self.revision} of the control of rotation {self.pk}"

    @classmethod
    def change(
        cls,
        rotation: Rotation,
        action: ActionKind,
        values: Mapping[str, object],
        *,
        by: str,
        revision: int | None = None,
    ) -> "Control":
        """Change the control row of a rotation in a transaction of its own, log it, and return the row.

        ``revision`` is the one that the user has seen; None to change any.

        Raises:
            RevisionError: Another user has changed the row since that revision.
        """
        database = rotation._state.db
        with transaction.atomic(using=database):
            rows = cls.objects.using(database)
            # Locks the row: two users at once get different revisions.
            present, _ = rows.select_for_update().get_or_create(rotation=rotation)
            if revision is not None and present.revision != revision:
                raise RevisionError(rotation.pk, revision, present.revision, present.changed_by)
            following = present.revision + 1
            changes = {**values, "revision": following, "changed_by": by, "changed_at": Now()}
            if action is ActionKind.PAUSED:
                changes["paused_by"] = by
            elif action is ActionKind.CANCELLED:
                changes |= {"cancelled_by": by, "cancel_revision": following}
            rows.filter(rotation=rotation).update(**changes)
            Action.objects.using(database).create(
                rotation=rotation,
                kind=action,
                by=by,
                detail=" ".join(f"{name}={value}" for name, value in values.items() if name != "paused"),
            )
            return rows.get(rotation=rotation)


class Action(models.Model):
    """What a user or a process did with a rotation, for its page and ``rotations ID --log``."""

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="actions")
    kind = models.CharField(max_length=16, choices=[(kind.value, kind.value) for kind in ActionKind])
    by = models.CharField(max_length=255, default="", blank=True, help_text="The user or the process.")
    detail = models.TextField(default="", blank=True, help_text="One phrase, never a value of the column.")
    at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"{self.kind} by {self.by}"


class Ledger(models.Model):
    """The salted digests of a rotation's old values, which are in a table of their own.

    Transitions::

        loading -> ready | forgotten
        ready   -> forgotten
    """

    class State(models.TextChoices):
        """The state of a ledger; a forgotten one has neither a table nor a salt."""

        LOADING = "loading"
        READY = "ready"
        FORGOTTEN = "forgotten"

    class Guard(models.TextChoices):
        """What the guard's trigger does with a write of an old value."""

        NONE = ""
        REFUSE = "refuse"
        KEEP = "keep"

    rotation = models.OneToOneField(Rotation, on_delete=models.CASCADE, related_name="ledger")
    salt = models.BinaryField(help_text="A secret: with it, a value that can be guessed can be found.")
    state = models.CharField(max_length=16, choices=State, default=State.LOADING)
    loaded_through = models.JSONField(
        null=True, help_text="The key up to which it is loaded; null before the first range."
    )
    started_xid = models.BigIntegerField(
        help_text="The oldest transaction that was open when loading began (xid8)."
    )
    entries = models.BigIntegerField(default=0, help_text="Digests in the table.")
    control_rows = models.BigIntegerField(
        default=0, help_text="Rows of a sample that were all found in it before the rotation."
    )
    guard = models.CharField(max_length=16, choices=Guard, default=Guard.NONE, blank=True)
    guard_hits = models.BigIntegerField(
        default=0, help_text="Old values that earlier guards met; the present guard has a sequence."
    )
    created_at = models.DateTimeField(db_default=Now())
    ready_at = models.DateTimeField(null=True)
    forgotten_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"ledger of rotation {self.rotation_id}"


class Verification(models.Model):
    """A search for old values of a rotation in its table, and what it found.

    It reads the table in ranges of keys, so it can be resumed while ``finished_at`` is null.
    """

    rotation = models.ForeignKey(Rotation, on_delete=models.CASCADE, related_name="verifications")
    bound = models.JSONField(null=True, help_text="The highest key at its start; null without rows.")
    through = models.JSONField(null=True, help_text="The key up to which it has searched; null at its start.")
    rows = models.BigIntegerField(default=0, help_text="Rows that it has searched.")
    survivors = models.BigIntegerField(default=0, help_text="Rows whose present value is in the ledger.")
    survivor_keys = models.JSONField(default=list, help_text="The keys of the first survivors.")
    repairs = models.BooleanField(default=False, help_text="Whether it gives survivors new values.")
    repaired = models.BigIntegerField(default=0, help_text="Survivors that it has given new values.")
    result = models.JSONField(default=dict, help_text="Coverage, controls and result; empty until its end.")
    started_at = models.DateTimeField(db_default=Now())
    finished_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"verification {self.pk} of rotation {self.rotation_id}"

    @property
    def proved_survivors(self) -> int | None:
        """The survivors that it found at its end; None without a ledger, or where a control failed."""
        controls = self.result.get("controls")
        found: int | None = self.result.get("survivors")
        return found if controls and controls["have_passed"] else None


class Measurement(models.Model):
    """What the owner of a rotation measured at a moment, for the page and the metrics.

    It writes one every few seconds, and when its state or what holds it changes.
    """

    rotation = models.ForeignKey(
        Rotation, on_delete=models.CASCADE, related_name="measurements", db_index=False
    )
    at = models.DateTimeField(db_default=Now())
    rows_done = models.BigIntegerField()
    state = models.CharField(max_length=16, help_text="What the owner does, e.g. rotating or confirming.")
    held_by = models.TextField(
        default="",
        blank=True,
        help_text="The names of what holds it, one in each line; empty where nothing does.",
    )
    is_change = models.BooleanField(
        db_default=False, help_text="Whether state or held_by differ from its measurement before."
    )
    workers = models.IntegerField(help_text="The workers that may write.")
    commit_seconds = models.FloatField(null=True, help_text="The 90th percentile of a small commit's time.")
    baseline_seconds = models.FloatField(null=True, help_text="The same without the rotation.")
    waiting_sessions = models.IntegerField(null=True, help_text="Sessions that wait for a lock of a range.")
    replica_lags = models.JSONField(default=dict, help_text="The seconds of lag, by Django's aliases.")
    horizon_holders = models.JSONField(
        default=list, help_text="What keeps VACUUM from removing dead rows, one phrase each."
    )

    class Meta:
        indexes: ClassVar = [
            models.Index(fields=["rotation", "at"], name="rotator_measurement_at"),
            models.Index(
                fields=["rotation", "at"], condition=Q(is_change=True), name="rotator_measurement_change"
            ),
        ]

    def __str__(self) -> str:
        return f"measurement of rotation {self.rotation_id} at {self.at}"
