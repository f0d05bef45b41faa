"""Rotates each model and asks its own package about the new and the old secrets; prints one line for each."""

import hashlib
import json
import os
import re
import secrets
import sys
from datetime import timedelta
from io import StringIO

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_of_theirs.settings")
django.setup()

from allauth.account.models import EmailAddress, EmailConfirmation
from allauth.socialaccount.models import SocialAccount, SocialApp, SocialToken
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.utils import timezone
from django_otp.oath import hotp, totp
from django_otp.plugins.otp_hotp.models import HOTPDevice
from django_otp.plugins.otp_static.models import StaticDevice, StaticToken
from django_otp.plugins.otp_totp.models import TOTPDevice
from django.http import Http404
from django_rest_passwordreset.models import ResetPasswordToken
from django_rest_passwordreset.serializers import ResetTokenSerializer
from drfpasswordless.models import CallbackToken
from drfpasswordless.serializers import CallbackTokenAuthSerializer
from invitations.models import Invitation
from mama_cas.exceptions import ValidationError as TicketError
from mama_cas.models import ServiceTicket
from oauth2_provider.models import AccessToken, Application, Grant, IDToken, RefreshToken
from oauth2_provider.oauth2_validators import OAuth2Validator
from oauthlib.common import Request
from oidc_provider.models import Client as OidcClient
from rest_framework_api_key.models import APIKey
from rest_framework_simplejwt.tokens import RefreshToken as JwtRefresh
from shop import models as shop
from social_django.models import Code, DjangoStorage

ROWS = 30
LATER = timezone.now() + timedelta(days=1)
USERS = [User.objects.create(username=f"user {i}", email=f"u{i}@example.org") for i in range(ROWS)]
# The secrets that generators made, by the stored value: a hash does not reveal its secret.
MADE = {}


def client_secret():
    secret = secrets.token_hex()
    stored = make_password(secret)
    MADE[stored] = secret
    return {"client_secret": stored}


def access_token():
    token = secrets.token_hex()
    return {"token": token, "token_checksum": hashlib.sha256(token.encode()).hexdigest()}


def api_key():
    key, prefix, hashed = APIKey.objects.key_generator.generate()
    MADE[hashed] = key
    return {"prefix": prefix, "hashed_key": hashed}


def hex_16():
    return secrets.token_hex(8)


sys.modules["cases"] = sys.modules[__name__]


def otp_accepts(device, code):
    """Whether the package takes the code, whatever it was asked before."""
    device.throttle_reset(commit=False)
    device.last_t = -1
    return device.verify_token(code)


def totp_is_accepted(pk, key):
    device = TOTPDevice.objects.get(pk=pk)
    return otp_accepts(device, totp(bytes.fromhex(key), device.step, device.t0, device.digits, device.drift))


def hotp_is_accepted(pk, key):
    device = HOTPDevice.objects.get(pk=pk)
    return otp_accepts(device, hotp(bytes.fromhex(key), device.counter))


def static_is_accepted(pk, token):
    found = StaticToken.objects.get(pk=pk)
    taken = otp_accepts(found.device, token)
    if taken:
        found.save(force_insert=True)
    return taken


def same(model, name):
    """The package compares what its model shows."""
    return lambda pk, value: getattr(model.objects.get(pk=pk), name) == value


def found(model, name):
    """The package looks the secret up."""
    return lambda pk, value: model.objects.filter(**{name: value}, pk=pk).exists()


def make_client(i):
    new_values = Application.objects.create(
        user=USERS[i], client_type="confidential", authorization_grant_type="password", client_secret=f"leaked {i}"
    )
    MADE[Application.objects.get(pk=new_values.pk).client_secret] = f"leaked {i}"
    return new_values


def client_is_accepted(pk, secret):
    client = Application.objects.get(pk=pk)
    # The stored hash has the secret that it was made from.
    body = {"client_id": client.client_id, "client_secret": MADE.get(secret, secret)}
    return OAuth2Validator().authenticate_client(Request("https://example.org", "POST", body))


def make_access(i):
    return AccessToken.objects.create(user=USERS[i], token=f"leaked {i}", expires=LATER, scope="read")


def access_is_accepted(pk, token):
    request = Request("https://example.org")
    return OAuth2Validator().validate_bearer_token(token, ["read"], request) and request.access_token.pk == pk


def make_grant(i):
    return Grant.objects.create(
        user=USERS[i], code=f"leaked {i}", application=Application.objects.first() or make_client(i), expires=LATER,
        redirect_uri="https://example.org",
    )


def grant_is_accepted(pk, code):
    client = Grant.objects.get(pk=pk).application
    return OAuth2Validator().validate_code(client.client_id, code, client, Request("https://example.org"))


def make_key(i):
    new_values, key = APIKey.objects.create_key(name=f"key {i}")
    MADE[new_values.hashed_key] = key
    return new_values


def make_confirmation(i):
    address = EmailAddress.objects.create(user=USERS[i], email=f"u{i}@example.org")
    return EmailConfirmation.objects.create(email_address=address, key=f"leaked{i}", sent=timezone.now())


def confirmation_is_accepted(pk, key):
    # As a link in a mail, whose letters a mail program may have changed.
    accepted = EmailConfirmation.from_key(key.upper())
    return accepted is not None and accepted.pk == pk


def invitation_is_accepted(pk, key):
    return Invitation.objects.filter(key=key.lower(), pk=pk).exists()


def reset_is_accepted(_pk, token):
    try:
        return ResetTokenSerializer(data={"token": token}).is_valid()
    except Http404:
        return False


def callback_is_accepted(pk, token):
    email = CallbackToken.objects.get(pk=pk).user.email
    return CallbackTokenAuthSerializer(data={"email": email, "token": token}).is_valid()


def ticket_is_accepted(pk, ticket):
    try:
        accepted = ServiceTicket.objects.validate_ticket(ticket, "https://example.org")
    except TicketError:
        return False
    # It is valid once.
    ServiceTicket.objects.filter(pk=pk).update(consumed=None, expires=LATER)
    return accepted.pk == pk


def code_is_accepted(pk, code):
    accepted = DjangoStorage.code.get_code(code)
    return accepted is not None and accepted.pk == pk


def make_social(i):
    app = SocialApp.objects.get_or_create(provider="x", name="x", client_id="x")[0]
    account = SocialAccount.objects.create(user=USERS[i], provider="x", uid=str(i))
    return SocialToken.objects.create(app=app, account=account, token=f"leaked {i}", token_secret="")


def of(model):
    return lambda i: model.objects.create()


def by_jwt(i):
    JwtRefresh.for_user(USERS[i])


def static(i):
    return StaticDevice.objects.create(user=USERS[i]).token_set.create(token=f"leaked{i}")


G = ("--generator",)
# Name, label, how a row is made, what is rotated besides, the secret's field, what the package says of a secret
ROTATED = [
    ("django-otp TOTP", "otp_totp.TOTPDevice.key", lambda i: TOTPDevice.objects.create(user=USERS[i]), (), "key", totp_is_accepted),
    ("django-otp HOTP", "otp_hotp.HOTPDevice.key", lambda i: HOTPDevice.objects.create(user=USERS[i]), (), "key", hotp_is_accepted),
    ("django-otp static", "otp_static.StaticToken.token", static, (*G, "django_otp.plugins.otp_static.models.StaticToken.random_token"), "token", static_is_accepted),
    ("oauth-toolkit client", "oauth2_provider.Application.client_secret", make_client, (*G, "cases.client_secret"), "client_secret", client_is_accepted),
    ("oauth-toolkit access token", "oauth2_provider.AccessToken.token oauth2_provider.AccessToken.token_checksum", make_access, (*G, "cases.access_token"), "token", access_is_accepted),
    ("oauth-toolkit grant", "oauth2_provider.Grant.code", make_grant, (*G, "secrets.token_hex"), "code", grant_is_accepted),
    ("drf-api-key", "rest_framework_api_key.APIKey.prefix rest_framework_api_key.APIKey.hashed_key", make_key, (*G, "cases.api_key"), "hashed_key", lambda _pk, value: APIKey.objects.is_valid(MADE[value])),
    ("invitations", "invitations.Invitation.key", lambda i: Invitation.create(f"i{i}@example.org"), (*G, "secrets.token_hex"), "key", invitation_is_accepted),
    ("allauth confirmation", "account.EmailConfirmation.key", make_confirmation, (*G, "secrets.token_hex"), "key", confirmation_is_accepted),
    ("allauth social token", "socialaccount.SocialToken.token", make_social, (*G, "secrets.token_hex"), "token", found(SocialToken, "token")),
    ("rest-passwordreset", "django_rest_passwordreset.ResetPasswordToken.key", lambda i: ResetPasswordToken.objects.create(user=USERS[i]), (*G, "django_rest_passwordreset.models.ResetPasswordToken.generate_key"), "key", reset_is_accepted),
    ("drfpasswordless", "drfpasswordless.CallbackToken.key", lambda i: CallbackToken.objects.create(user=USERS[i], to_alias="a", to_alias_type="EMAIL", type="AUTH"), (), "key", callback_is_accepted),
    ("mama-cas", "mama_cas.ServiceTicket.ticket", lambda i: ServiceTicket.objects.create_ticket(user=USERS[i], service="https://example.org", expires=LATER), (*G, "mama_cas.models.ServiceTicket.objects.create_ticket_str"), "ticket", ticket_is_accepted),
    ("social-auth code", "social_django.Code.code", lambda i: Code.objects.create(email=f"u{i}@example.org", code=f"leaked{i}"), (*G, "social_django.models.Code.generate_code"), "code", code_is_accepted),
    ("encrypted-model-fields", "shop.Fernet.secret", of(shop.Fernet), (), "secret", same(shop.Fernet, "secret")),
    ("django-cryptography", "shop.Cryptography.secret", of(shop.Cryptography), (), "secret", same(shop.Cryptography, "secret")),
    ("searchable-encrypted-fields", "shop.Unsearchable.secret", of(shop.Unsearchable), (), "secret", same(shop.Unsearchable, "secret")),
    ("model-utils", "shop.Stamped.secret", of(shop.Stamped), (), "secret", found(shop.Stamped, "secret")),
    ("django-extensions", "shop.RandomNeighbour.secret", of(shop.RandomNeighbour), (), "secret", found(shop.RandomNeighbour, "secret")),
    ("shortuuid", "shop.Short.secret", of(shop.Short), (), "secret", found(shop.Short, "secret")),
    ("oauth-toolkit id token", "oauth2_provider.IDToken.jti", lambda i: IDToken.objects.create(user=USERS[i], expires=LATER, scope=""), (), "jti", found(IDToken, "jti")),
]
# Name, label, options, what the refusal says
REFUSED = [
    ("Django's user", "auth.User.password", (), "no user could log in with a plain text in it"),
    ("encrypted-model-fields, blank", "shop.FernetBlank.secret", (), "use --include-blank"),
    ("oauth-toolkit client, plain", "oauth2_provider.Application.client_secret", (), "is a ClientSecretField, which transforms"),
    ("oauth-toolkit token alone", "oauth2_provider.AccessToken.token", (*G, "secrets.token_hex"), "is a TokenChecksumField, which derives its value from .*AccessToken.token"),
    ("oauth-toolkit refresh token", "oauth2_provider.RefreshToken.token", (*G, "secrets.token_hex"), "RefreshToken.token_checksum is a TokenChecksumField"),
    ("drf-api-key hash", "rest_framework_api_key.APIKey.hashed_key", (), "suggests that it holds a hash"),
    ("authtoken", "authtoken.Token.key", (), "is the primary key"),
    ("knox", "knox.AuthToken.digest", (), "is the primary key"),
    ("sessions", "sessions.Session.session_key", (), "is the primary key"),
    ("simplejwt jti", "token_blacklist.OutstandingToken.jti", (), "Signed tokens refer to it"),
    ("rest-passwordreset, no default", "django_rest_passwordreset.ResetPasswordToken.key", (), "--generator django_rest_passwordreset.models.ResetPasswordToken.generate_key"),
    ("invitations, no default", "invitations.Invitation.key", (), "--generator secrets.token_hex"),
    ("django-otp static, no default", "otp_static.StaticToken.token", (), "application's random_token|at most 16 characters"),
    ("mama-cas, no default", "mama_cas.ServiceTicket.ticket", (), "--generator mama_cas.models.ServiceTicket.objects.create_ticket_str"),
    ("social-auth code, no default", "social_django.Code.code", (), "--generator social_django.models.Code.generate_code"),
    ("social-auth data", "social_django.UserSocialAuth.extra_data", (), "values for a JSONField"),
    ("pylti1p3", "lti1p3_tool_config.LtiToolKey.private_key", (), "a new pair of keys"),
    ("allauth mfa", "mfa.Authenticator.data", (), "values for a JSONField"),
    ("pgcrypto-fields", "shop.Pgp.secret", (), "SQL expression of its own"),
    ("searchable-encrypted-fields, searched", "shop.Searchable.secret", (), "Searchable.search is a SearchField, which derives its value from"),
]
# Name, label, what the preflight says
WARNED = [
    ("simple-history", "shop.WithHistory.secret", "shop_historicalwithhistory.* a history: old values remain there"),
    ("pghistory", "shop.WithEvents.secret", "shop_witheventsevent.* a trigger of the table writes new values there too"),
    ("auditlog", "shop.WithHistory.secret", "auditlog_logentry"),
    ("oauth-toolkit id token", "oauth2_provider.IDToken.jti", "signed tokens refer to jti"),
]


def command(label, *options):
    out, err = StringIO(), StringIO()
    call_command("async_rotate", *label.split(), *options, stdout=out, stderr=err)
    return " ".join((out.getvalue() + err.getvalue()).split())


def rotated(label, make, options, field, is_accepted):
    model = type(make(0))
    for i in range(1, ROWS):
        make(i)
    before = dict(model.objects.values_list("pk", field))
    rotated_names = {part.rpartition(".")[2] for part in label.split()}
    others = [f.attname for f in model._meta.concrete_fields if f.name not in rotated_names]
    first = min(before, key=str)
    assert is_accepted(first, before[first]), "the package refuses the secret before the rotation"
    before_others = list(model.objects.order_by("pk").values_list(*others))
    command(label, *options, "--batch", "7")
    assert list(model.objects.order_by("pk").values_list(*others)) == before_others, "other fields have changed"
    after = dict(model.objects.values_list("pk", field))
    assert after.keys() == before.keys() and len(set(after.values())) == len(after)
    for pk in after:
        assert is_accepted(pk, after[pk]), "the package refuses a new secret"
        assert before[pk] != after[pk] and not is_accepted(pk, before[pk]), "the package accepts an old secret"
    return None


def run(name, label, expected, case):
    passed, reason = outcome(expected, case)
    model = label.split()[0].rpartition(".")[0]
    print(json.dumps({"name": name, "model": model, "passed": passed, "reason": reason}), flush=True)


def outcome(expected, case):
    try:
        said = case()
    except CommandError as error:
        said = str(error)
    except AssertionError as error:
        return False, str(error)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    if expected is None:
        failed = isinstance(said, str)
        return not failed, said if failed else "rotated"
    passed = re.search(expected, " ".join(said.split())) is not None
    return passed, expected if passed else said


by_jwt(0)
for name, label, make, options, field, accepts in ROTATED:
    run(name, label, None, lambda: rotated(label, make, options, field, accepts))
for name, label, options, text in REFUSED:
    run(name, label, text, lambda: command(label, *options))
for name, label, text in WARNED:
    run(name, label, text, lambda: command(label, "--dry-run", "--no-sample"))
