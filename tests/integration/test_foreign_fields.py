"""Fields and models as other packages write them: what is refused, and where new values come from."""

import pytest
from django.contrib.auth.models import User

from rotator.errors import TargetError, ValuesError
from rotator.run.options import RunOptions
from rotator.service import prepare

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

ROWS = 40
OPTIONS = RunOptions(batch=15, concurrency=2)
MADE_BY = "tests.shop.generators."


# --- Values that are changed in SQL ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "hook"),
    [
        ("placeholder", "get_placeholder"),
        ("placeholder_sql", "get_placeholder_sql"),
        ("prepared", "get_db_prep_save"),
        ("saved", "pre_save"),
    ],
)
def test_a_field_that_changes_its_value_in_sql_is_refused(field: str, hook: str) -> None:
    with pytest.raises(TargetError, match=rf"SQL expression of its own \({hook}"):
        prepare([f"shop.WrittenInSql.{field}"], "default", OPTIONS)


def test_a_binary_field_of_django_is_not_refused() -> None:
    assert prepare(["shop.ByInteger.as_bytes"], "default", OPTIONS).target.columns == ("as_bytes",)


# --- What generators return ------------------------------------------------------------------------


def test_a_constant_is_refused_although_each_ciphertext_differs() -> None:
    with pytest.raises(ValuesError, match="gave the same value 100 times"):
        prepare(["shop.WrittenInSql.encrypted"], "default", OPTIONS)


# --- Names -----------------------------------------------------------------------------------------


@pytest.mark.django_db(
    transaction=True,
    available_apps=["rotator", "tests.shop", "django.contrib.auth", "django.contrib.contenttypes"],
)
def test_a_model_that_another_one_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User._meta, "swapped", "shop.Client")
    with pytest.raises(
        TargetError, match=r"AUTH_USER_MODEL puts shop\.Client in its place. Rotate shop\.Client\.pass"
    ):
        prepare(["auth.User.password"], "default", OPTIONS)
