"""The evidence of a rotation: what is proved, and first of all what is not.

It is one JSON object in the canonical form of RFC 8785, so that the same facts are the same bytes. Its fields
follow the sample form of NIST SP 800-88 Rev. 1, Appendix G, where they fit.
It contains no digest, no salt, and no value of a column or a filter.
"""

import json
from datetime import datetime
from typing import Any, Final

from rotator.management.rotation import stored
from rotator.models import Ledger, Rotation, Verification
from rotator.options import Selection

FORMAT: Final = "django-async-rotator evidence 1"
NOT_CLAIMED: Final = (
    "Backups, WAL archives, replicas with a delay, exports and file system snapshots can hold old values.",
    "Logs of the server, of poolers and of the application can hold old values.",
    "Caches and queues outside the database can hold old values.",
    "Other columns and other tables were not searched for old values.",
    "Values that were replaced before the ledger was loaded are not in the ledger.",
    "After VACUUM, the bytes of dead rows stay in free space of the files until they are overwritten.",
    "Whether another system still accepts an old value is unknown.",
    "No compliance with a standard is claimed. The form of a certificate is used, not its authority.",
)
_METHOD: Final = (
    "Each row was updated with a new value by a transaction that also recorded the range of rows. VACUUM "
    "removes the old row versions."
)
_VERIFICATION: Final = (
    "Full: the salted SHA-256 digest, cut to 64 bits, of each present value was looked up in the ledger of "
    "the digests of the old values. Controls: planted values, a sample before the rotation, and the "
    "number of entries."
)
_CONTROLS: Final = ("planted", "planted_found", "sampled", "entries", "entries_found", "have_passed")


def evidence(rotation: Rotation) -> str:
    """Return the evidence of a rotation as canonical JSON, with a final line end."""
    verifications = stored(Verification, rotation).filter(finished_at__isnull=False).order_by("pk")
    searches = [verification.result for verification in verifications if not verification.repairs]
    latest = searches[-1] if searches else {}
    facts = {
        # Capital letters come first in the canonical order.
        "NOT_PROVED": _not_proved(rotation, latest),
        "claims_not_made": list(NOT_CLAIMED),
        "form": {"format": FORMAT, "structure": "NIST SP 800-88 Rev. 1, Appendix G, where it fits"},
        "ledger": _ledger(rotation.ledger_row),
        "media": {
            "media_type": "column of a PostgreSQL table",
            "server": latest.get("server_name", ""),
            "server_version": latest.get("server_version", ""),
            "system_identifier": rotation.identity.get("system", ""),
            "table": rotation.table_name,
            "target": rotation.target,
            "vacuumed_at": latest.get("vacuumed_at", ""),
        },
        "sanitization": {
            "finished_at": rotation.finished_at,
            "host": rotation.owner_host,
            "late_rows": rotation.late_rows,
            "method_used": _METHOD,
            "options": _texts(rotation.options),
            "person": rotation.owner_user,
            "rotation": rotation.pk,
            "rows": rotation.rows_done,
            "rows_total": rotation.rows_total,
            "selection": Selection.from_json(rotation.selection).without_values().to_json(),
            "started_at": rotation.started_at,
            "status": rotation.status,
            "tool_used": f"django-async-rotator {rotation.version}",
        },
        "verification": {
            "method": _VERIFICATION,
            "over_time": [_verification(verification) for verification in verifications],
        },
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_time)
    return f"{text}\n"


def _time(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def _not_proved(rotation: Rotation, latest: dict[str, Any]) -> dict[str, Any]:
    """Return what is left, as counts and sentences, from the latest verification."""
    coverage, controls = latest.get("coverage") or {}, latest.get("controls") or {}
    unknown, ledger = coverage.get("unknown"), rotation.ledger_row
    rejected = coverage.get("rejected_keys") or [
        {"key": key, "reason": reason} for key, reason in rotation.rejected_keys
    ]
    counts = {
        "excluded_rows": coverage.get("excluded_rows"),
        "kept_blank_rows": coverage.get("blank_rows"),
        "kept_null_rows": coverage.get("null_rows"),
        "not_confirmed_rows": coverage.get("unconfirmed_rows", rotation.unconfirmed_rows),
        "not_written_rows": coverage.get("older_rows"),
        "rows_in_gaps": coverage.get("gap_rows"),
        "survivors": latest.get("survivors"),
    }
    survivors, in_gaps = counts["survivors"], counts["rows_in_gaps"]
    not_written, excluded = counts["not_written_rows"], counts["excluded_rows"]
    reasons = {
        "The rotation is not completed.": rotation.status != Rotation.Status.COMPLETED,
        "The rotation has no ledger, so survivors are unknown.": ledger is None,
        "The ledger was dropped, so survivors are unknown since then.": ledger and ledger.forgotten_at,
        "No verification has finished.": not latest,
        "A control of the verification failed.": not controls.get("have_passed", True),
        f"{survivors} rows have an old value.": survivors,
        f"The server rejected the new values of {len(rejected)} rows, which keep old values.": rejected,
        f"{in_gaps} rows are in gaps that the rotation has not written.": in_gaps,
        f"{not_written} rows have not been written since the rotation began.": not_written,
        f"{excluded} rows do not match the filters now, so they may have old values.": excluded,
        f"The last writers of the rows are unknown: {unknown}.": unknown,
    }
    return {
        "is_verified": bool(latest.get("is_verified")),
        "reasons": [sentence for sentence, is_true in reasons.items() if is_true],
        "rejected_keys": rejected,
        "rejected_rows": len(rejected),
        **counts,
    }


def _ledger(ledger: Ledger | None) -> dict[str, Any] | None:
    if ledger is None:
        return None
    return {
        "entries": ledger.entries,
        "forgotten_at": ledger.forgotten_at,
        "guard": ledger.guard,
        "ready_at": ledger.ready_at,
        "rows_of_the_control": ledger.control_rows,
        "started_at": ledger.created_at,
        "state": ledger.state,
    }


def _verification(verification: Verification) -> dict[str, Any]:
    result = verification.result
    controls = result.get("controls") or {}
    return {
        "controls": {name: controls.get(name) for name in _CONTROLS} if controls else None,
        "finished_at": verification.finished_at,
        "guard_hits": result.get("guard_hits"),
        "host": result.get("host"),
        "is_verified": result.get("is_verified"),
        "number": verification.pk,
        "person": result.get("user"),
        "repaired_rows": verification.repaired,
        "rows": verification.rows,
        "started_at": verification.started_at,
        "survivors": result.get("survivors"),
    }


def _texts(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with texts for fractions, which have several forms in JSON."""
    return {
        name: _texts(value) if isinstance(value, dict) else str(value) if isinstance(value, float) else value
        for name, value in options.items()
    }
