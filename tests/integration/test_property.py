"""Whatever happens to a table while it is rotated: no row that has its old value is confirmed."""

import os

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings

from tests.integration.property_scenarios import Rotate, Scenario, scenarios
from tests.integration.property_world import world
from tests.integration.rotation_tables import COMMITTING, Database

pytestmark = COMMITTING

# A few that are always the same; to look for more, set it to some hundreds.
_EXAMPLES = int(os.environ.get("ROTATOR_PROPERTY_EXAMPLES", "0"))
# An example takes a second, so that to look for the smallest that fails takes minutes.
_SHRINKS = "ROTATOR_PROPERTY_SHRINK" in os.environ


def _settings(examples: int) -> settings:
    return settings(
        max_examples=_EXAMPLES or examples,
        derandomize=not _EXAMPLES,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if _SHRINKS else [])],
        suppress_health_check=[
            # Each example makes its own table, and empties the rotator's.
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )


@_settings(10)
@given(scenario=scenarios())
def test_no_row_with_an_old_value_is_confirmed(database: Database, scenario: Scenario) -> None:
    _assert_none_is_confirmed(database, scenario)


@pytest.mark.slow
@_settings(40)
@given(scenario=scenarios())
def test_no_row_with_an_old_value_is_confirmed_in_more_scenarios(
    database: Database, scenario: Scenario
) -> None:
    _assert_none_is_confirmed(database, scenario)


def _assert_none_is_confirmed(database: Database, scenario: Scenario) -> None:
    with world(database.server, scenario) as new_values:
        for step in scenario.steps:
            if isinstance(step, Rotate):
                new_values.run(step)
            else:
                new_values.edit(step)
        new_values.finish()
        for what, times in new_values.done.items():
            event(what if times else f"no {what}")
