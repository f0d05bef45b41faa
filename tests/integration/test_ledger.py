"""The ledger: what enters it, when, and what refuses one."""

import pytest
from rotator.models import Ledger
from tests.integration.outcomes import SHOP, EventRecorder, rotate, rotate_tickets
from tests.integration.rotation_tables import TARGET, TICKETS, Database

pytestmark = SHOP


def test_it(database: Database) -> None:
    database.make_tickets(1, 5000)
    outcome = rotate_tickets(EventRecorder(print), prove=True, batch=500, guard="refuse")
    print(outcome)
    from rotator.progress.summary import summary
    print(summary(outcome))
    assert outcome.verification and outcome.verification.is_verified
    assert 0
