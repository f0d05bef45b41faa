"""The secret columns of published packages, by hand from their documentation and models."""

from typing import Final

KNOWN: Final = {
    "account.EmailConfirmation.key": "secret",
    "auth.User.password": "hashed",
    "authtoken.Token.key": "secret",
    "invitations.Invitation.key": "secret",
    "knox.AuthToken.digest": "hashed",
    "mfa.Authenticator.data": "secret",
    "oauth2_provider.AccessToken.token": "secret",
    "oauth2_provider.AccessToken.token_checksum": "hashed",
    "oauth2_provider.Application.client_secret": "hashed",
    "oauth2_provider.DeviceGrant.device_code": "secret",
    "oauth2_provider.DeviceGrant.user_code": "secret",
    "oauth2_provider.Grant.code": "secret",
    "oauth2_provider.RefreshToken.token": "secret",
    "oauth2_provider.RefreshToken.token_checksum": "hashed",
    "otp_email.EmailDevice.token": "secret",
    "otp_hotp.HOTPDevice.key": "secret",
    "otp_static.StaticToken.token": "secret",
    "otp_totp.TOTPDevice.key": "secret",
    "rest_framework_api_key.APIKey.hashed_key": "hashed",
    # The prefix and the hash, with a dot between them.
    "rest_framework_api_key.APIKey.id": "hashed",
    "sessions.Session.session_key": "secret",
    "socialaccount.SocialApp.key": "secret",
    "socialaccount.SocialApp.secret": "secret",
    # Apple's private key, for example.
    "socialaccount.SocialApp.settings": "secret",
    "socialaccount.SocialToken.token": "secret",
    "socialaccount.SocialToken.token_secret": "secret",
    "token_blacklist.OutstandingToken.token": "secret",
}
"""Of the packages that the rules name, and of Django."""

UNKNOWN: Final = {
    "django_rest_passwordreset.ResetPasswordToken.key": "secret",
    "drfpasswordless.CallbackToken.key": "secret",
    "lti1p3_tool_config.LtiToolKey.private_key": "secret",
    "mama_cas.ServiceTicket.ticket": "secret",
    "oidc_provider.Client.client_secret": "secret",
    "oidc_provider.Code.code": "secret",
    "oidc_provider.RSAKey.key": "secret",
    "oidc_provider.Token._id_token": "secret",
    "oidc_provider.Token.access_token": "secret",
    "oidc_provider.Token.refresh_token": "secret",
    "shop.Cryptography.secret": "secret",
    "shop.Fernet.secret": "secret",
    "shop.FernetBlank.secret": "secret",
    # Only a sample of its values reveals them.
    "shop.Integration.parameters": "secret",
    "shop.Integration.reference": "secret",
    "shop.Pgp.secret": "secret",
    "shop.RandomNeighbour.secret": "secret",
    "shop.Searchable.secret": "secret",
    "shop.Short.secret": "secret",
    "shop.Stamped.secret": "secret",
    "shop.Unsearchable.secret": "secret",
    "shop.WithEvents.secret": "secret",
    "shop.WithHistory.secret": "secret",
    "social_django.Association.secret": "secret",
    "social_django.Code.code": "secret",
    "social_django.Partial.token": "secret",
}
"""Of packages that the rules do not name, and of the project."""

COPIES: Final = {
    "admin.LogEntry.object_repr",
    "auditlog.LogEntry.changes",
    "auditlog.LogEntry.changes_text",
    "auditlog.LogEntry.serialized_data",
    "sessions.Session.session_data",
    "shop.HistoricalWithHistory.secret",
    "shop.WithEventsEvent.secret",
}
