"""The result of a verification, as text and as JSON."""

from typing import Final

from rotator.events import Controls, Coverage, Verified
from rotator.progress.text import count, one_line, plural, unconfirmed

KEYS_NAMED: Final = 20


def verification_report(event: Verified) -> dict[str, object]:
    """Return a verification as JSON types; these keys are an interface and only ever added to."""
    return {"result": verification_verdict(event), **event.to_json()}


def verification_summary(event: Verified) -> str:
    """Return the result as text of several lines, without a final line end."""
    facts = [] if event.coverage is None else _covered(event.coverage)
    if event.survivors is None:
        facts.append(("survivors", "unknown"))
    else:
        facts += [
            ("searched", plural(event.rows, "row")),
            ("survivors", _survivors(event)),
            ("false hits", f"{event.false_matches:.1g} expected among them, by chance"),
        ]
    vacuumed = f"{event.vacuumed_at}, about {count(event.dead_rows)} dead rows now"
    facts += [
        ("repaired", plural(event.repaired, "row") if event.repaired else ""),
        ("controls", _controlled(event.controls) if event.controls else ""),
        ("guard", f"{plural(event.guard_hits, 'write')} of old values stopped" if event.guard_hits else ""),
        ("vacuumed", vacuumed if event.vacuumed_at else ""),
    ]
    lines = [f"  {label:<12} {one_line(value)}" for label, value in facts if value]
    return "\n".join([verification_verdict(event), *lines])


def verification_verdict(event: Verified) -> str:
    """Return the result in one sentence."""
    name = f"rotation {event.rotation} of {event.target}"
    if event.error:
        return (
            f"Not verified: the verification of {name} did not finish. {one_line(event.error)} "
            f"Run: manage.py verify_rotation {event.rotation}"
        )
    if event.controls is not None and not event.controls.have_passed:
        return f"Not verified: a control of {name} failed, so its search proves nothing."
    if event.survivors:
        return (
            f"Not verified: {plural(event.survivors, 'row')} of {event.target} "
            f"{'has' if event.survivors == 1 else 'have'} an old value of rotation {event.rotation}. "
            f"Run: manage.py verify_rotation {event.rotation} --repair"
        )
    if event.coverage is not None and not event.coverage.is_whole:
        return f"Not verified: {name} has not written every row."
    if event.survivors is None:
        return (
            f"Not verified: it is unknown whether old values of {name} have survived, because it has no "
            "ledger. Use --prove with the next rotation."
        )
    return f"Verified: no row of {event.target} has an old value of rotation {event.rotation}."


def _covered(coverage: Coverage) -> list[tuple[str, str]]:
    facts = [("status", coverage.status)]
    if coverage.unknown:
        facts.append(("written", f"unknown: {coverage.unknown}"))
    else:
        facts += [
            ("written", f"{plural(coverage.confirmed_rows or 0, 'row')} confirmed"),
            ("", unconfirmed(coverage.unconfirmed_rows)),
            ("not written", f"{plural(coverage.older_rows or 0, 'row')} since the start"),
        ]
    gaps = ", ".join(map(str, coverage.gaps[:KEYS_NAMED]))
    rejected = [f"{key}: {reason}" for key, reason in coverage.rejected_keys[:KEYS_NAMED]]
    return [
        *facts,
        ("in gaps", f"{plural(coverage.gap_rows, 'row')}{f': {gaps}' if gaps else ''}"),
        ("rejected", "; ".join([plural(len(coverage.rejected_keys), "row"), *rejected])),
        ("excluded", f"{plural(coverage.excluded_rows, 'row')} that do not match the filters now"),
        ("kept", f"{plural(coverage.null_rows, 'row')} with NULL, {count(coverage.blank_rows)} with ''"),
    ]


def _survivors(event: Verified) -> str:
    named = ", ".join(event.survivor_keys[:KEYS_NAMED])
    more = (event.survivors or 0) - min(KEYS_NAMED, len(event.survivor_keys))
    return (
        f"{plural(event.survivors or 0, 'row')}{f': {named}' if named else ''}"
        f"{f', and {count(more)} more' if more > 0 and named else ''}"
    )


def _controlled(controls: Controls) -> str:
    known = "" if controls.is_salt_right else "; the salt is NOT the one of its entries"
    sampled = f"{count(controls.sampled)} of {count(controls.sampled)} sampled rows found"
    if not controls.sampled:
        sampled = "no row was unchanged since the start, to be sampled,"
    return (
        f"{sampled} before the rotation; "
        f"{count(controls.planted_found)} of {count(controls.planted)} planted values found; "
        f"{count(controls.entries_found)} of {count(controls.entries)} entries in the ledger{known}"
    )
