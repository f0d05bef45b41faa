"""Appended to the settings of the project."""

INSTALLED_APPS += [  # noqa: F821
    "rotator",
    "django.contrib.sites",
    "django_otp",
    "django_otp.plugins.otp_totp",
    "django_otp.plugins.otp_hotp",
    "django_otp.plugins.otp_static",
    "django_otp.plugins.otp_email",
    "oauth2_provider",
    "rest_framework",
    "rest_framework.authtoken",
    "rest_framework_api_key",
    "rest_framework_simplejwt.token_blacklist",
    "knox",
    "invitations",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.socialaccount",
    "django_rest_passwordreset",
    "drfpasswordless",
    "oidc_provider",
    "mama_cas",
    "pylti1p3.contrib.django.lti1p3_tool_config",
    "social_django",
    "auditlog",
    "pgtrigger",
    "pghistory",
    "simple_history",
]
MIDDLEWARE += ["allauth.account.middleware.AccountMiddleware"]  # noqa: F821
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
FIELD_ENCRYPTION_KEYS = ["f164ec6bd6fbc4aef5647abc15199da0f9badcc1d2127bde2087ae0d794a9a0b"]
FIELD_ENCRYPTION_KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
PGCRYPTO_KEY = "of the tests"
INVITATIONS_INVITATION_EXPIRY = 3
USE_TZ = True
