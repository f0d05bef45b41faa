"""The rules that find columns with secrets, on plain models and invented samples."""

import secrets
import uuid
from typing import Any

import pytest
from django.db import models
from django.test.utils import isolate_apps

from rotator.fields.model import AnyField
from rotator.fields.secret_rules import Finding, Kind, judge
from rotator.postgres.column_samples import ColumnSample

NO_FORMATS = {"a Stripe key": 0}
RANDOM = ColumnSample(
    values=300, distinct=300, mean_length=40, bits=160, digit_changes=0.4, spaced=0, formats=NO_FORMATS
)
WORDS = ColumnSample(
    values=300, distinct=300, mean_length=40, bits=160, digit_changes=0.02, spaced=250, formats=NO_FORMATS
)
NUMBERED = ColumnSample(
    values=300, distinct=300, mean_length=15, bits=13, digit_changes=0.3, spaced=0, formats=NO_FORMATS
)


def model(name: str, module: str = "tests.unit", /, **fields: Any) -> type[models.Model]:  # noqa: ANN401 - fields, whatever they store
    with isolate_apps("tests.shop"):
        meta = type("Meta", (), {"app_label": "shop"})
        return type(name, (models.Model,), {"__module__": module, "Meta": meta, **fields})


def found(
    field_name: str,
    field: AnyField,
    *,
    model_name: str = "Order",
    sample: ColumnSample | None = None,
) -> Finding | None:
    return judge(model(model_name, **{field_name: field})._meta.get_field(field_name), sample)  # type: ignore[arg-type]


def text(**options: Any) -> AnyField:  # noqa: ANN401 - any option of the field
    return models.CharField(max_length=80, **options)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "api_key",
            "apikey",
            "secret",
            "webhook_secret",
            "token",
            "access_token",
            "client_secret",
            "password",
        ),
        *("apiKey", "private_key", "backup_codes", "reset_code", "invitation_key", "otp", "_refresh_token"),
        "credentials",
    ],
)
def test_a_name_reveals_a_secret(name: str) -> None:
    finding = found(name, text())
    assert finding is not None
    assert finding.kind is Kind.SECRET
    assert finding.reasons == (f"its name is {name}",)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "title",
            "key",
            "code",
            "token_expires",
            "password_changed_at",
            "token_type",
            "client_id",
            "api_key_id",
        ),
        *("public_key", "secret_name", "reset_url", "key_prefix", "max_tokens", "keyboard", "spin", "broken"),
        *("checksum", "digest", "jti", "nonce", "code_challenge", "author", "country_code"),
    ],
)
def test_a_name_reveals_no_secret(name: str) -> None:
    assert found(name, text()) is None


@pytest.mark.parametrize(
    "field",
    [
        models.BooleanField(),
        models.DateTimeField(),
        models.IntegerField(),
        models.EmailField(),
        models.FileField(),
        models.CharField(max_length=9, choices=[("a", "A")]),
    ],
    ids=lambda field: type(field).__name__,
)
def test_a_type_that_holds_no_secret(field: AnyField) -> None:
    assert found("token", field) is None


@pytest.mark.parametrize(
    "field",
    [models.UUIDField(default=uuid.uuid4), models.BinaryField(), models.TextField(), models.JSONField()],
    ids=lambda field: type(field).__name__,
)
def test_a_type_that_can_hold_a_secret(field: AnyField) -> None:
    assert found("token", field) is not None


def test_a_pin_can_be_a_number() -> None:
    assert found("pin", models.IntegerField()) is not None


def test_a_default_reveals_a_secret() -> None:
    finding = found("reference", text(default=secrets.token_hex))
    assert finding is not None
    assert finding.reasons == ("its default is secrets.token_hex()",)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("public_id", text(default=secrets.token_hex)),
        ("reference", text(default="none")),
        ("reference", models.UUIDField(default=uuid.uuid4)),
    ],
)
def test_a_default_reveals_no_secret(name: str, field: AnyField) -> None:
    assert found(name, field) is None


@pytest.mark.parametrize("model_name", ["ApiKey", "APIKey", "LoginToken", "Invitation", "TOTPDevice"])
def test_a_vague_name_is_a_secret_in_some_models(model_name: str) -> None:
    finding = found("key", text(), model_name=model_name)
    assert finding is not None
    assert finding.reasons == (f"its name is {model_name}.key",)


@pytest.mark.parametrize("sibling", ["expires_at", "valid_until", "verified"])
def test_a_vague_name_is_a_secret_if_its_rows_expire(sibling: str) -> None:
    ticket = model("Ticket", code=text(), routing_key=text(), **{sibling: models.DateTimeField()})
    finding = judge(ticket._meta.get_field("code"))  # type: ignore[arg-type]
    assert finding is not None
    assert finding.reasons == ("its name is code, and its rows expire or are used once",)
    assert judge(ticket._meta.get_field("routing_key")) is None  # type: ignore[arg-type]


def test_a_type_reveals_a_secret() -> None:
    class EncryptedTextField(models.TextField):  # type: ignore[type-arg]
        pass

    finding = found("note", EncryptedTextField())
    assert finding is not None
    assert finding.reasons == ("its type is EncryptedTextField",)


@pytest.mark.parametrize(
    ("name", "model_name"),
    [("password_hash", "Order"), ("token_checksum", "Order"), ("hashed_key", "ApiKey"), ("digest", "Token")],
)
def test_a_name_reveals_hashes(name: str, model_name: str) -> None:
    finding = found(name, text(), model_name=model_name)
    assert finding is not None
    assert finding.kind is Kind.HASHED
    assert "hashes" in finding.advice


def test_a_sample_reveals_hashes() -> None:
    sample = ColumnSample(values=2, distinct=2, hashes=2, formats=NO_FORMATS)
    finding = found("password", text(), sample=sample)
    assert finding is not None
    assert finding.kind is Kind.HASHED


def test_a_sample_reveals_random_values() -> None:
    finding = found("reference", text(), sample=RANDOM)
    assert finding is not None
    assert finding.reasons == ("300 of 300 sampled values are different and look random",)


@pytest.mark.parametrize("sample", [WORDS, NUMBERED], ids=["words", "numbered"])
def test_a_sample_reveals_nothing(sample: ColumnSample) -> None:
    assert found("reference", text(), sample=sample) is None


@pytest.mark.parametrize("name", ["external_id", "sha256", "image_path", "slug"])
def test_random_values_of_an_identifier_are_no_secret(name: str) -> None:
    assert found(name, text(), sample=RANDOM) is None


@pytest.mark.parametrize(
    "field", [text(), models.URLField(), models.JSONField()], ids=["text", "url", "json"]
)
def test_a_sample_reveals_a_format(field: AnyField) -> None:
    sample = ColumnSample(values=30, formats={"a Stripe key": 3, "a Slack token": 1})
    finding = found("hook_url", field, sample=sample)
    assert finding is not None
    assert finding.reasons == ("3 of 30 sampled values have the format of a Stripe key",)


def test_a_sample_reveals_a_json_key() -> None:
    sample = ColumnSample(values=30, json_keys=12, formats=NO_FORMATS)
    finding = found("settings", models.JSONField(), sample=sample)
    assert finding is not None
    assert finding.reasons == ("12 of 30 sampled documents have a key such as token or secret",)


@pytest.mark.parametrize("name", ["private_key", "ssh_key", "jwt"])
def test_a_random_value_replaces_no_key_pair_and_no_signature(name: str) -> None:
    finding = found(name, models.TextField())
    assert finding is not None
    assert finding.advice


@pytest.mark.parametrize(
    "names",
    [
        ("history_id", "history_date", "history_type"),
        ("pgh_id", "pgh_created_at", "pgh_label"),
    ],
    ids=["simple-history", "pghistory"],
)
def test_a_history_holds_copies(names: tuple[str, ...]) -> None:
    history = model("Past", token=text(), title=text(), **{name: text() for name in names})
    finding = judge(history._meta.get_field("token"))  # type: ignore[arg-type]
    assert finding is not None
    assert finding.kind is Kind.COPY
    assert judge(history._meta.get_field("title")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "name", "field"),
    [
        ("reversion.models", "Version", "serialized_data"),
        ("auditlog.models", "LogEntry", "changes"),
        ("django.contrib.sessions.base_session", "AbstractBaseSession", "session_data"),
    ],
)
def test_an_audit_table_holds_copies(module: str, name: str, field: str) -> None:
    audit = model(name, module, **{field: models.TextField()})
    finding = judge(audit._meta.get_field(field))  # type: ignore[arg-type]
    assert finding is not None
    assert finding.kind is Kind.COPY
    assert finding.advice


def test_a_project_s_subclass_follows_the_rules_of_its_package() -> None:
    with isolate_apps("tests.shop"):

        class AbstractAPIKey(models.Model):
            prefix = text()
            hashed_key = text()

            class Meta:
                abstract = True
                app_label = "shop"

        AbstractAPIKey.__module__ = "rest_framework_api_key.models"

        class PartnerKey(AbstractAPIKey):  # noqa: DJ008 - no instance is shown
            class Meta:
                app_label = "shop"

    finding = judge(PartnerKey._meta.get_field("hashed_key"))
    assert finding is not None
    assert finding.reasons == ("rest_framework_api_key keeps secrets there",)
    assert judge(PartnerKey._meta.get_field("prefix")) is None
