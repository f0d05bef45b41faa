"""Fields and models as other packages write them: what is refused, and where new values come from."""

import base64
import uuid
from collections.abc import Callable

import pytest
from django.contrib.auth.models import User

from rotator.api import RotationUnfinishedError, Target, prepare, rotate_sync
from rotator.exceptions import OptionError, TargetError, ValuesError
from rotator.options import RunOptions, Selection
from rotator.progress.preflight import preflight
from tests.integration.any_model import table_of
from tests.integration.outcomes import assert_completed, each_connection, rotate
from tests.integration.rotation_tables import Database
from tests.shop import models
from tests.shop.generators import letters, token
from tests.shop.models import Client

pytestmark = pytest.mark.django_db(transaction=True, available_apps=["rotator", "tickets", "tests.shop"])

ROWS = 40
OPTIONS = RunOptions(batch=15, concurrency=2, vacuum=False, pace="full")
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
    with pytest.raises(ValuesError, match="returned the same value 100 times"):
        prepare(
            ["shop.WrittenInSql.encrypted"], "default", OPTIONS, Selection(generator=f"{MADE_BY}constant")
        )


# --- Keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("PrefixedKey", "lpad(i::text, 8, '0')"),
        ("BinaryKey", "sha256(i::text::bytea)"),
        ("IntervalKey", "i * interval '1.5 hours'"),
    ],
)
@pytest.mark.parametrize("settings", ["", "SET bytea_output = escape"])
def test_rows_are_found_by_keys_with_another_value_in_python(
    database: Database, model: str, key: str, settings: str
) -> None:
    table = f"shop_{model.lower()}"
    database.execute(
        f"INSERT INTO {table} (id, secret) SELECT {key}, i::text FROM generate_series(1, {ROWS}) i"
    )
    with each_connection(settings or "SELECT 1"):
        outcome = rotate(f"shop.{model}.secret", selection=Selection(generator=MADE_BY + "named_after"))
    assert_completed(outcome, rows=ROWS)
    assert database.execute(f"SELECT count(DISTINCT secret) FROM {table} WHERE secret LIKE '%-%'") == [
        (ROWS,)
    ]


# --- Names -----------------------------------------------------------------------------------------


@pytest.mark.django_db(
    transaction=True,
    available_apps=["rotator", "tests.shop", "django.contrib.auth", "django.contrib.contenttypes"],
)
def test_a_model_that_another_one_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User._meta, "swapped", "shop.Client")
    with pytest.raises(
        TargetError, match=r"AUTH_USER_MODEL replaces it by shop\.Client\. Rotate shop\.Client\.pass"
    ):
        prepare(["auth.User.password"], "default", OPTIONS)


# --- Rows without a secret -------------------------------------------------------------------------


def make_clients(database: Database) -> None:
    Client.objects.bulk_create(Client(secret="" if i % 4 == 0 else f"leaked {i}") for i in range(ROWS))
    database.count_updates(table_of(Client, "secret"))


def test_a_blank_secret_stays_blank(database: Database) -> None:
    make_clients(database)
    prepared = prepare(["shop.Client.secret"], "default", OPTIONS)
    assert "secret stays blank in 10 rows without --include-blank" in preflight(
        prepared.examine(lambda _event: None)
    )
    assert_completed(prepared.rotate(lambda _event: None), rows=30)
    assert Client.objects.filter(secret="").count() == 10
    assert "leaked" not in "".join(Client.objects.values_list("secret", flat=True))
    assert sum(database.updates().values()) == 30


def test_a_blank_secret_is_rotated_where_that_is_asked_for(database: Database) -> None:
    make_clients(database)
    assert rotate_sync(Target("shop.Client.secret", include_blank=True)).rows == ROWS
    assert not Client.objects.filter(secret="").exists()
    assert database.rotation("selection")["include_blank"]


@pytest.mark.parametrize("name", ["encrypted", "reversed"])
def test_a_field_that_does_not_store_blank_as_an_empty_text_needs_the_users_decision(name: str) -> None:
    label = f"shop.Optional.{name}"
    with pytest.raises(TargetError, match=r"stores a blank value in another form .* use --include-blank"):
        prepare([label], "default", OPTIONS)
    models.Optional.objects.bulk_create(models.Optional(**{name: ""}) for _ in range(ROWS))
    assert rotate_sync(Target(label, include_blank=True)).rows == ROWS
    assert not models.Optional.objects.filter(**{name: ""}).exists()


def test_where_null_is_allowed_it_stands_for_no_secret() -> None:
    models.Optional.objects.bulk_create(models.Optional(nullable=None) for _ in range(ROWS))
    assert rotate_sync(Target("shop.Optional.nullable")).rows == 0
    assert models.Optional.objects.filter(nullable=None).count() == ROWS


def test_of_several_columns_each_blank_and_each_null_stays(database: Database) -> None:
    models.ByInteger.objects.bulk_create(
        models.ByInteger(
            id=i, as_text="" if i % 2 else "leaked", nullable=("", None, "leaked")[i % 3], as_bytes=b""
        )
        for i in range(60)
    )
    labels = [f"shop.ByInteger.{name}" for name in ("as_text", "nullable", "as_bytes")]
    prepared = prepare(labels, "default", OPTIONS)
    said = preflight(prepared.examine(lambda _event: None))
    assert "nullable stays NULL in 20 rows without --include-null" in said
    assert "as_bytes stays blank in 60 rows" in said
    # Those with an odd number and no text in the other column have nothing to rotate.
    assert_completed(prepared.rotate(lambda _event: None), rows=40)
    for row in models.ByInteger.objects.all():
        assert (row.as_text == "") == bool(row.id % 2)
        assert (row.nullable == "", row.nullable is None) == (row.id % 3 == 0, row.id % 3 == 1)
        assert bytes(row.as_bytes) == b""
    assert not models.ByInteger.objects.filter(as_text="leaked").exists()
    assert not models.ByInteger.objects.filter(nullable="leaked").exists()
    assert database.rotation("rows_done") == 40


# --- Fields that are derived, or seem to be --------------------------------------------------------


def test_fields_that_change_with_each_save_are_not_derived(database: Database) -> None:
    make_clients(database)
    before = list(Client.objects.order_by("id").values_list("modified", "tag", "once", "encrypted"))
    prepared = prepare(["shop.Client.secret"], "default", OPTIONS)
    assert prepared.target.bypassed == ("modified (ModifiedField) keeps its value",)
    assert_completed(prepared.rotate(lambda _event: None), rows=30)
    assert list(Client.objects.order_by("id").values_list("modified", "tag", "once", "encrypted")) == before


def test_a_hash_with_a_salt_is_unclear_and_can_be_ignored_by_name(database: Database) -> None:
    models.Salted.objects.bulk_create(models.Salted() for _ in range(ROWS))
    with pytest.raises(
        TargetError, match=r"may be derived from .* use --ignore-derived salted: the field keeps"
    ):
        prepare(["shop.Salted.secret"], "default", OPTIONS)
    before = list(models.Salted.objects.order_by("id").values_list("salted", flat=True))
    assert rotate_sync(Target("shop.Salted.secret", ignore_derived=["salted"])).rows == ROWS
    assert list(models.Salted.objects.order_by("id").values_list("salted", flat=True)) == before
    assert database.rotation("selection")["ignore_derived"] == ["salted"]


def test_only_a_field_next_to_the_target_can_be_ignored() -> None:
    for name in ("secret", "nothing"):
        with pytest.raises(OptionError, match=f"--ignore-derived {name}: .* It has id, salted"):
            prepare(["shop.Salted.secret"], "default", OPTIONS, Selection(ignore_derived=(name,)))
    with pytest.raises(
        OptionError, match=r"^--ignore-derived nothing --ignore-derived secret: shop\.Salted has"
    ):
        prepare(["shop.Salted.secret"], "default", OPTIONS, Selection(ignore_derived=("secret", "nothing")))


def test_all_fields_that_are_derived_by_a_descriptor_are_found() -> None:
    derives = "is a SearchField, which derives its value from"
    with pytest.raises(
        TargetError, match=rf"^shop\.Searchable\.search {derives} .* shop\.Searchable\.old_search {derives}"
    ):
        prepare(["shop.Searchable.secret"], "default", OPTIONS)


def test_a_field_that_makes_its_own_value_stores_another_one_as_it_is(database: Database) -> None:
    Client.objects.bulk_create(Client(once="leaked") for _ in range(ROWS))
    database.count_updates(table_of(Client, "once"))
    assert rotate_sync(Target("shop.Client.once", generator=f"{MADE_BY}short")).rows == ROWS
    assert "leaked" not in Client.objects.values_list("once", flat=True)


# --- Where values come from ------------------------------------------------------------------------

ADVICE = {
    "Maker.key": r"application's generate_key .* --generator tests\.shop\.models\.Maker\.generate_key\.",
    "Maker.pin": r"at most 10 characters, e\.g\. secrets\.token_hex\(5\)",
    "Maker.number": r"--generator uuid\.uuid4",
    "Maker.blob": r"--generator secrets\.token_bytes",
    "Maker.hashed_key": r"suggests that it holds a hash",
    "Maker.private_key": r"a new pair of keys",
    "Maker.ticket": r"--generator tests\.shop\.models\.Maker\.objects\.create_ticket_text\.",
    "Maker.serial": r"--generator tests\.shop\.models\.Maker\.generate_serial\.",
    # Its method saves the row.
    "Maker.voucher": r"e\.g\. --generator secrets\.token_hex\.",
    "Maker.options": r"values for a JSONField",
    "Maker.keyhash": r"suggests that it holds a hash",
    "Maker.same_by_server": r"values for a DateTimeField",
    "Maker.identifier": r"form that the field's validators accept and at most 20 characters",
    "Maker.long": r"--generator secrets\.token_hex\.",
    "Maker.count": r"secrets\.randbelow",
    "Maker.token_jti": r"Signed tokens refer to it",
}


def test_the_advice_fits_the_field() -> None:
    for field, advice in ADVICE.items():
        with pytest.raises(TargetError, match=f"has no default that makes .*{advice}") as caught:
            prepare([f"shop.{field}"], "default", OPTIONS)
        assert "token_urlsafe" not in str(caught.value)


PRESENT: dict[str, tuple[Callable[[int], str], str]] = {
    "32 base32 digits": (
        lambda i: base64.b32encode(i.to_bytes(20, "little")).decode(),
        r"form of the present ones \(32 base32 digits\)\.",
    ),
    "a prefix": (
        lambda i: f"ST-{10 ** (i % 4)}-{token()}",
        r"present ones \(letters, digits, hyphens and underscores, the same first characters\)\.",
    ),
    "upper-case letters and digits": (
        lambda i: f"{i:02}{'7K9Q1ZP08M'[i % 10 :]}".ljust(12, "0"),
        r"present ones \(12 upper-case letters and digits",
    ),
    "UUIDs": (
        lambda _: str(uuid.uuid4()),
        r"present ones \(36 letters, digits, hyphens and underscores, in groups\)\.",
    ),
    "16 hexadecimal digits": (
        lambda i: f"{i * 7919:016x}"[::-1],
        r"secrets\.token_hex\(8\)\.",
    ),
    "most of them blank": (
        lambda i: base64.b32encode(i.to_bytes(20, "little")).decode() if i > 15 else "",
        r"form of the present ones \(32 base32 digits",
    ),
    "no alphabet": (lambda i: f"{i}/{token()}", r"form of the present ones\."),
    "letters and digits": (
        lambda i: f"{i:02}{letters()[:18]}".ljust(50, "Z"),
        r"one that returns secrets\.token_hex\(25\)\.",
    ),
    "other hexadecimal digits": (
        lambda i: f"{i * 7919:064x}"[::-1],
        r"e\.g\. --generator secrets\.token_hex\.",
    ),
}


@pytest.mark.usefixtures("database")
def test_the_advice_fits_the_present_values() -> None:
    for make, advice in PRESENT.values():
        values = [make(i) for i in range(1, 20)]
        models.Maker.objects.all().delete()
        models.Maker.objects.bulk_create(
            models.Maker(key="1", pin="1", number=uuid.uuid4(), blob=b"1", own_default="1", long=value)
            for value in values
        )
        with pytest.raises(TargetError, match=advice) as caught:
            prepare(["shop.Maker.long"], "default", OPTIONS)
        assert not any(value and value in str(caught.value) for value in values)


def test_the_advice_does_not_wait_for_a_lock(database: Database) -> None:
    locker = database.connect()
    locker.execute("BEGIN")
    locker.execute("LOCK TABLE shop_maker")
    try:
        with pytest.raises(TargetError, match=r"--generator secrets\.token_hex"):
            prepare(["shop.Maker.long"], "default", OPTIONS)
    finally:
        locker.execute("ROLLBACK")


@pytest.mark.parametrize(
    ("field", "generator"),
    [
        ("ticket", "tests.shop.models.Maker.objects.create_ticket_text"),
        ("key", "tests.shop.models.Maker.generate_key"),
        ("key", "tests.shop.models.Maker.generate_for_class"),
        ("key", "tests.shop.models.Maker.generate_for_row"),
        ("own_default", ""),
        ("by_server", ""),
        ("by_server,own_default", ""),
    ],
)
def test_a_method_a_default_of_the_field_and_one_of_the_server(
    database: Database, field: str, generator: str
) -> None:
    make_makers()
    table = table_of(models.Maker, field.partition(",")[0])
    before = database.values(table)
    labels = [f"shop.Maker.{name}" for name in field.split(",")]
    assert rotate_sync(Target(labels, generator=generator), batch=15).rows == ROWS
    assert database.changed(before, table) == before.keys()
    assert len(set(database.values(table).values())) == ROWS
    if generator.endswith("row"):
        assert all(row.key.startswith(f"{row.pk} ") for row in models.Maker.objects.all())


def make_makers() -> None:
    models.Maker.objects.bulk_create(
        models.Maker(
            key=f"leaked {i}",
            ticket=f"leaked {i}",
            pin="1",
            number=uuid.uuid4(),
            blob=b"1",
            own_default=f"leaked {i}",
        )
        for i in range(ROWS)
    )


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("field", "warning"),
    [
        ("jti", "tokens that are revoked by it become valid again"),
        ("hashed_key", "suggests that it holds a hash"),
    ],
)
def test_names_that_warn(field: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    make_makers()
    target = Target(f"shop.Maker.{field}", generator=f"{MADE_BY}token")
    prepared = prepare(
        [f"shop.Maker.{field}"], "default", OPTIONS, Selection(generator=target.generator, include_blank=True)
    )
    assert warning in preflight(prepared.examine(lambda _event: None))
    rotate_sync(target)
    assert warning in caplog.text


# --- The trial -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "reason"),
    [
        ("none_for_row", "returned None for api_key"),
        ("constant_for_row", "returned the same value 100 times"),
        ("wrong_mapping", "returned a mapping with nothing"),
    ],
)
def test_a_row_generator_is_tried_before_the_rotation_begins(
    database: Database, generator: str, reason: str
) -> None:
    models.Order.objects.bulk_create(models.Order(api_key=f"leaked {i}") for i in range(ROWS))
    database.count_updates(table_of(models.Order, "api_key"))
    with pytest.raises(ValuesError, match=reason):
        rotate_sync(Target("shop.Order.api_key", generator=MADE_BY + generator))
    assert database.execute("SELECT id FROM rotator_rotation") == []
    assert not database.updates()


def test_the_trial_is_rolled_back(database: Database) -> None:
    models.Order.objects.bulk_create(models.Order(api_key=f"leaked {i}") for i in range(ROWS))
    database.count_updates(table_of(models.Order, "api_key"))
    assert rotate_sync(Target("shop.Order.api_key", generator=f"{MADE_BY}named_after")).rows == ROWS
    assert set(database.updates().values()) == {1}


def test_while_no_row_is_done_the_generator_can_be_changed(database: Database) -> None:
    models.Order.objects.bulk_create(models.Order(api_key=f"leaked {i}") for i in range(ROWS))
    database.before_update("RAISE EXCEPTION 'no';", table_of(models.Order, "api_key"))
    label = "shop.Order.api_key"
    with pytest.raises(RotationUnfinishedError):
        rotate_sync(Target(label, generator=f"{MADE_BY}token"))
    for refused in (
        Target(label, generator=f"{MADE_BY}letters", filters=["status=active"]),
        Target(label, generator=f"{MADE_BY}letters", include_blank=True),
    ):
        with pytest.raises(OptionError, match="was begun with"):
            rotate_sync(refused)
    database.execute("ALTER TABLE shop_order DISABLE TRIGGER USER")
    changed = Target(label, generator=f"{MADE_BY}named_after")
    prepared = prepare(
        [label], "default", RunOptions(batch=5, stop_after_rows=5), Selection(generator=changed.generator)
    )
    assert prepared.rotate(lambda _event: None).resumed
    assert database.rotation("selection")["generator"] == changed.generator
    # Now that rows are done, it stays.
    with pytest.raises(OptionError, match="was begun with"):
        rotate_sync(Target(label, generator=f"{MADE_BY}token"))
    assert rotate_sync(changed).rows == ROWS
    database.execute("ALTER TABLE shop_order ENABLE TRIGGER USER")
    assert all(row.api_key.startswith(f"{row.pk}-") for row in models.Order.objects.all())


# --- Copies in other tables ------------------------------------------------------------------------


def test_tables_with_copies_are_named(database: Database) -> None:
    make_clients(database)
    database.execute("CREATE SCHEMA tenant")
    try:
        for statement in (
            "CREATE TABLE shop_historicalclient (history_id bigint, secret varchar(80))",
            'CREATE TABLE "shop_Client audit" (entry jsonb)',
            "CREATE TABLE shop_cliententry (entry text)",
            "CREATE TABLE tenant.shop_client (secret varchar(80))",
            "CREATE TABLE shop_copy (secret varchar(80))",
            "CREATE TABLE shop_number (secret integer)",
            (
                "CREATE FUNCTION tenant.note() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN INSERT INTO public.shop_cliententry VALUES (new.secret); RETURN new; END $$"
            ),
            "CREATE TRIGGER note AFTER UPDATE ON shop_client FOR EACH ROW EXECUTE FUNCTION tenant.note()",
        ):
            database.execute(statement)
        found = prepare(["shop.Client.secret"], "default", OPTIONS).examine(lambda _event: None)
        said = " ".join(preflight(found).split())
    finally:
        database.execute("DROP SCHEMA tenant CASCADE")
        database.execute(
            'DROP TABLE shop_historicalclient, "shop_Client audit", shop_cliententry, shop_copy, shop_number'
        )
    assert [copies.kind for copies in found.table.copies] == ["trigger", "history", "schema", "name"]
    assert "shop_cliententry a trigger of the table writes new values there too" in said
    assert (
        '"shop_Client audit", shop_historicalclient a history: old values remain there, and a revert' in said
    )
    assert "tenant.shop_client the same table in another schema" in said
    assert "shop_copy, shop_salted, shop_searchable a column of the same name" in said
    assert "shop_number" not in said
