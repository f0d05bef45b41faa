"""The rules that find columns with secrets: by name, type, default, package and a sample of values."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from django.db.models import (
    BinaryField,
    CharField,
    EmailField,
    FileField,
    IntegerField,
    JSONField,
    TextField,
    URLField,
    UUIDField,
)

from rotator.fields.advice import HASH_NAME
from rotator.fields.model import AnyField
from rotator.postgres.column_samples import ColumnSample

_MOST_REASONS: Final = 3


class Kind(Enum):
    """The kind of a column with secrets, which decides what to do about it."""

    SECRET = "secret"  # noqa: S105 - not a secret itself
    HASHED = "hashed"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class Finding:
    """The reasons why a column seems to hold secrets, one phrase each, without any value.

    ``advice`` is what to do about the column, where that is not a rotation; empty otherwise.
    """

    kind: Kind
    reasons: tuple[str, ...]
    advice: str = ""


# --- The rules for published packages ------------------------------------------------------------------

_AUDITLOG: Final = "Delete old entries: manage.py auditlogflush."
_SILK: Final = "Delete old requests: manage.py silk_clear_request_log."
_NEW_PASSWORDS: Final = "It holds hashes: make users set new passwords."
_LOG_OUT: Final = "Delete the rows: users log in again and get new tokens."
_NEW_KEYS: Final = "It holds hashes: issue new keys to their owners, and revoke the old ones."
_SHORT_LIVED: Final = "Delete the rows: the codes expire within minutes, and users request new ones."
_SIGNED: Final = (
    "It holds signed tokens, which stay valid whatever the column holds: replace the key of their signature."
)
_REVOKE: Final = "Revoke the tokens at the provider, then delete the rows."
_CHECKSUM: Final = "It holds hashes of token: rotate both together."
_PAIR: Final = "It holds private keys: make a new pair of keys, and publish the new public key."

# By the package, the class without Abstract and Base, and the field; None where a column holds no secret.
_PACKAGES: Final[Mapping[str, tuple[Kind, str] | None]] = {
    "allauth.Authenticator.data": (Kind.SECRET, ""),
    "allauth.EmailConfirmation.key": (Kind.SECRET, ""),
    "allauth.SocialApp.key": (Kind.SECRET, "Get a new key from the provider."),
    "allauth.SocialApp.secret": (Kind.SECRET, "Get a new secret from the provider."),
    "allauth.SocialApp.settings": (Kind.SECRET, "Get new keys from the provider."),
    "allauth.SocialToken.token": (Kind.SECRET, _REVOKE),
    "allauth.SocialToken.token_secret": (Kind.SECRET, _REVOKE),
    "django.Session.session_key": (Kind.SECRET, "Delete the rows: every user logs in again."),
    "django.User.password": (Kind.HASHED, _NEW_PASSWORDS),
    "django_otp.EmailDevice.token": (
        Kind.SECRET,
        "Set the column to NULL: the codes expire within minutes, and users request new ones.",
    ),
    "django_otp.HOTPDevice.key": (Kind.SECRET, ""),
    "django_otp.StaticToken.token": (Kind.SECRET, ""),
    "django_otp.TOTPDevice.key": (Kind.SECRET, ""),
    "invitations.Invitation.key": (Kind.SECRET, ""),
    "knox.AuthToken.digest": (Kind.HASHED, f"It holds hashes. {_LOG_OUT}"),
    "knox.AuthToken.token_key": None,
    "oauth2_provider.AccessToken.token": (Kind.SECRET, ""),
    "oauth2_provider.AccessToken.token_checksum": (Kind.HASHED, _CHECKSUM),
    "oauth2_provider.Application.client_secret": (
        Kind.HASHED,
        "It holds hashes, unless hash_client_secret is off: issue new secrets to the clients.",
    ),
    "oauth2_provider.DeviceGrant.device_code": (Kind.SECRET, _SHORT_LIVED),
    "oauth2_provider.DeviceGrant.user_code": (Kind.SECRET, _SHORT_LIVED),
    "oauth2_provider.Grant.code": (Kind.SECRET, ""),
    "oauth2_provider.RefreshToken.token": (Kind.SECRET, ""),
    "oauth2_provider.RefreshToken.token_checksum": (Kind.HASHED, _CHECKSUM),
    "oauth2_provider.RefreshToken.token_family": None,
    "rest_framework.Token.key": (Kind.SECRET, f"It is the primary key. {_LOG_OUT}"),
    "rest_framework_api_key.APIKey.hashed_key": (Kind.HASHED, _NEW_KEYS),
    "rest_framework_api_key.APIKey.id": (Kind.HASHED, _NEW_KEYS),
    "rest_framework_api_key.APIKey.prefix": None,
    "rest_framework_simplejwt.OutstandingToken.token": (Kind.SECRET, _SIGNED),
    # Copies of whole rows, as text or JSON.
    "auditlog.LogEntry.changes": (Kind.COPY, _AUDITLOG),
    "auditlog.LogEntry.changes_text": (Kind.COPY, _AUDITLOG),
    "auditlog.LogEntry.serialized_data": (Kind.COPY, _AUDITLOG),
    "django.LogEntry.object_repr": (Kind.COPY, "Delete the entries of models whose str() shows a secret."),
    "django.Session.session_data": (Kind.COPY, "Delete the rows: every user logs in again."),
    "django_celery_results.TaskResult.result": (Kind.COPY, "Delete old results."),
    "django_celery_results.TaskResult.task_args": (Kind.COPY, "Delete old results."),
    "django_celery_results.TaskResult.task_kwargs": (Kind.COPY, "Delete old results."),
    "easyaudit.CRUDEvent.changed_fields": (Kind.COPY, "Delete old events."),
    "easyaudit.CRUDEvent.object_json_repr": (Kind.COPY, "Delete old events."),
    "reversion.Version.serialized_data": (Kind.COPY, "Delete old versions: manage.py deleterevisions."),
    "silk.Request.encoded_headers": (Kind.COPY, _SILK),
    "silk.Request.raw_body": (Kind.COPY, _SILK),
    "silk.Response.encoded_headers": (Kind.COPY, _SILK),
    "silk.Response.raw_body": (Kind.COPY, _SILK),
}

_SIMPLE_HISTORY: Final = {"history_id", "history_date", "history_type"}
_PGHISTORY: Final = {"pgh_id", "pgh_created_at", "pgh_label"}


def _names_in_packages(field: AnyField) -> Iterator[tuple[str, str]]:
    """Yield the package of each class of a field's model, abstract ones too, and the field's name there."""
    for kind in field.model.__mro__:
        package = kind.__module__.partition(".")[0]
        model = kind.__name__.removeprefix("Abstract").removeprefix("Base")
        yield package, f"{package}.{model}.{field.name}"


# --- The rules for names, types and defaults -----------------------------------------------------------

_KEYS: Final = (
    "api|private|access|signing|encryption|auth|session|secret|shared|master|license|ssh|rsa|webhook|deploy"
    "|hmac|client|consumer|recovery|activation|confirmation|verification|reset|invitation|invite"
)
_CODES: Final = (
    "backup|recovery|device|auth|authorization|activation|confirmation|verification|reset|invitation|invite"
    "|login|otp|sms|pin|access"
)
_SECRET_NAME: Final = re.compile(
    r"(^|_)(secrets?|passwords?|passwd|pwd|passphrases?|passcodes?|tokens?|bearer|jwt|credentials?|apikeys?"
    rf"|({_KEYS})_?keys?|({_CODES})_?codes?|otp|totp|hotp|pin|cvv|cvc)(_|$)"
)
# Needs a second reason: most keys and codes are not secret.
_VAGUE_NAME: Final = re.compile(r"(^|_)(keys?|codes?|digest|checksum|hash|hashed)(_|$)")
_SECRET_MODEL: Final = re.compile(
    r"(^|_)(tokens?|secrets?|credentials?|api_?keys?|otp|[th]otp|passwords?|passcodes?|rsa|ssh|invitations?"
    r"|invites?|confirmations?|verifications?|activations?|resets?|grants?|sessions?|logins?|oauth2?|oidc"
    r"|webhooks?|licenses?)(_|$)"
)
_OTHER_NAME: Final = re.compile(
    r"^(is|has|use|uses|num|max|min|count|total|last|show|enable|require|requires|public)_|_public_|_public$"
    r"|(^|_)(id|ids|uid|guid|uuid|at|on|date|time|timestamp|count|type|kind|name|label|title|url|uri|urls|uris"
    r"|path|file|slug|expires|expiry|expiration|expired|in|lifetime|ttl|length|len|size|prefix|suffix|hint"
    r"|algorithm|alg|method|challenge|status|state|version|format|policy|scope|scopes|family|question|order"
    r"|index|limit|uses|used|attempts|seconds|minutes|days|jti|kid|sid|nonce|etag|email|username|country"
    r"|currency|language|locale|timezone)$"
)
_PRIVATE_KEY: Final = re.compile(r"(^|_)(private_?key|(rsa|ssh)_?key)(_|$)")
_SIGNED_NAME: Final = re.compile(r"(^|_)(jwt|id_token)(_|$)")
# A key or code is a secret if it can be used for some time, or once.
_EXPIRY_NAME: Final = re.compile(
    r"(^|_)(expires?|expiry|expiration|valid_until|verified|redeemed|consumed)(_|$)"
)
_TYPE_NAME: Final = re.compile(r"encrypt|fernet|pgp|cipher|secret|password|apikey", re.IGNORECASE)
_DEFAULT_NAME: Final = re.compile(r"token|secret|random|generat|api_?key|default_key|password|shortuuid")
_NUMBER_NAME: Final = re.compile(r"(^|_)(pin|otp|passcode|pin_?code)(_|$)")
# A project's field may have any base class; these have a form that is not a secret's.
_OTHER_TYPES: Final = (EmailField, FileField)
_SECRET_TYPES: Final = (CharField, TextField, BinaryField, UUIDField, JSONField)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_")


def can_hold_secrets(field: AnyField) -> bool:
    """Return whether the type of a field can hold secrets; not that it does."""
    if field.is_relation or field.choices or isinstance(field, _OTHER_TYPES):
        return False
    if isinstance(field, IntegerField):
        return bool(_NUMBER_NAME.search(_snake(field.name)))
    is_array = isinstance(getattr(field, "base_field", None), CharField | TextField)
    return isinstance(field, _SECRET_TYPES) or bool(_type_reason(field)) or is_array


def _type_reason(field: AnyField) -> str:
    names = [kind.__name__ for kind in type(field).__mro__ if not kind.__module__.startswith("django.db.")]
    return f"its type is {type(field).__name__}" if any(map(_TYPE_NAME.search, names)) else ""


def _default_reason(field: AnyField) -> str:
    default: object = field.default
    if not callable(default) or not isinstance(field, CharField | TextField | BinaryField):
        return ""
    name = getattr(default, "__qualname__", type(default).__qualname__)
    path = f"{getattr(default, '__module__', '')}.{name}"
    return f"its default is {path}()" if _DEFAULT_NAME.search(path.lower()) else ""


def _model_reason(field: AnyField) -> str:
    """Return the second reason that a field with a vague name holds a secret."""
    if _SECRET_MODEL.search(_snake(field.model.__name__)):
        return f"its name is {field.model.__name__}.{field.name}"
    names = {_snake(other.name) for other in field.model._meta.concrete_fields}
    if _snake(field.name) in ("key", "code") and any(map(_EXPIRY_NAME.search, names)):
        return f"its name is {field.name}, and its rows expire or are used once"
    return ""


# --- The rules for samples -----------------------------------------------------------------------------

_NO_SAMPLE: Final = ColumnSample(values=0, formats={})
_MIN_VALUES: Final = 20
_MIN_BITS: Final = 60
_MIN_DIGIT_CHANGES: Final = 0.2
_MIN_DISTINCT_PART: Final = 0.9
_MIN_FORMAT_PART: Final = 0.1
_MAX_BYTES: Final = 256


def _format_reasons(sample: ColumnSample) -> list[str]:
    return [
        f"{number} of {sample.values} sampled values have the format of {name}"
        for name, number in sample.formats.items()
        if number and number >= _MIN_FORMAT_PART * sample.values
    ]


def _json_reason(sample: ColumnSample) -> str:
    if not sample.json_keys or sample.json_keys < _MIN_FORMAT_PART * sample.values:
        return ""
    return f"{sample.json_keys} of {sample.values} sampled documents have a key such as token or secret"


def _random_reason(sample: ColumnSample) -> str:
    """Return the reason if most values of a sample are unique, long and look random."""
    looks_random = (
        sample.values >= _MIN_VALUES
        and sample.mean_length <= _MAX_BYTES
        and sample.bits >= _MIN_BITS
        and sample.digit_changes >= _MIN_DIGIT_CHANGES
        and sample.spaced * 10 < sample.values
        and sample.distinct >= _MIN_DISTINCT_PART * sample.values
    )
    reason = f"{sample.distinct} of {sample.values} sampled values are different and look random"
    return reason if looks_random else ""


# --- The judgement -------------------------------------------------------------------------------------


def judge(field: AnyField, sample: ColumnSample | None = None) -> Finding | None:
    """Return why a column seems to hold secrets; None if it does not."""
    for package, name in _names_in_packages(field):
        if name in _PACKAGES:
            if (known := _PACKAGES[name]) is None:
                return None
            kind, todo = known
            reason = (
                "it holds copies of other rows" if kind is Kind.COPY else f"{package} keeps secrets there"
            )
            return Finding(kind, (reason,), todo)
    found = _judge_unknown(field, sample or _NO_SAMPLE)
    names = {other.name for other in field.model._meta.concrete_fields}
    if found is not None and (names >= _SIMPLE_HISTORY or names >= _PGHISTORY):
        return Finding(
            Kind.COPY,
            ("it is the history of another table", *found.reasons),
            "It keeps old values: after the rotation, delete these rows, or overwrite the column.",
        )
    return found


def _judge_unknown(field: AnyField, sample: ColumnSample) -> Finding | None:
    if not can_hold_secrets(field):
        return None
    name = _snake(field.name)
    formats = _format_reasons(sample)
    strong = [*formats, _type_reason(field), _json_reason(sample)]
    is_other = bool(_OTHER_NAME.search(name)) or isinstance(field, URLField)
    if not is_other:
        strong += [f"its name is {field.name}"] if _SECRET_NAME.search(name) else []
        if not HASH_NAME.search(name):
            strong += [_default_reason(field), _random_reason(sample)]
        if _VAGUE_NAME.search(name):
            strong.append(_model_reason(field))
    is_hashed = sample.values > 0 and sample.hashes * 2 >= sample.values
    if is_hashed:
        strong.append("most sampled values have the format of a hash")
    reasons = tuple(dict.fromkeys(filter(None, strong)))[:_MOST_REASONS]
    if not reasons:
        return None
    if is_hashed or (HASH_NAME.search(name) and not formats):
        return Finding(Kind.HASHED, reasons, "It holds hashes: issue new secrets to their owners.")
    if _PRIVATE_KEY.search(name) or _PRIVATE_KEY.search(_snake(field.model.__name__)):
        return Finding(Kind.SECRET, reasons, _PAIR)
    if _SIGNED_NAME.search(name):
        return Finding(Kind.SECRET, reasons, _SIGNED)
    return Finding(Kind.SECRET, reasons)
