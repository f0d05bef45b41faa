"""Models of published packages: rotated, and then the package's own authentication is asked."""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.installed import Environment, Site, copy_of_this_repository
from tests.foreign import READY_MADE
from tests.foreign.secret_columns import COPIES, KNOWN, UNKNOWN

pytestmark = [pytest.mark.foreign, pytest.mark.django_db(transaction=True)]

PACKAGES = (
    "Django~=5.2.0",
    "django-allauth",
    "django-auditlog",
    "django-cryptography-5",
    "django-encrypted-model-fields",
    "django-extensions",
    "django-invitations",
    "django-mama-cas",
    "django-model-utils",
    "django-oauth-toolkit",
    "django-oidc-provider",
    "django-otp",
    "django-pgcrypto-fields",
    "django-pghistory",
    "django-rest-knox",
    "django-rest-passwordreset",
    "django-searchable-encrypted-fields",
    "django-simple-history",
    "djangorestframework",
    "djangorestframework-api-key",
    "djangorestframework-simplejwt",
    "drfpasswordless",
    "pylti1p3",
    "shortuuid",
    "social-auth-app-django",
)
"""As they are installed; django-fernet-encrypted-fields has a module of the same name as one of these."""

FILES = Path(__file__).parent / "site"
LEAST_MODELS = 20


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    clone = copy_of_this_repository(tmp_path_factory.mktemp("clones") / "clone")
    if ready_made := os.environ.get(READY_MADE):
        new_values = Environment(Path(ready_made))
    else:
        new_values = Environment.make(tmp_path_factory.mktemp("environments") / "venv")
        new_values.run(f"pip install {' '.join(repr(package) for package in PACKAGES)}", cwd=clone)
    new_values.run("pip install --force-reinstall --no-deps . && pip install .", cwd=clone)
    return new_values


@pytest.fixture(scope="module")
def site(
    environment: Environment,
    tmp_path_factory: pytest.TempPathFactory,
    django_db_blocker: pytest.FixtureRequest,
) -> Iterator[Site]:
    with django_db_blocker.unblock():  # type: ignore[attr-defined] # pytest-django's own
        started = Site.start(environment, tmp_path_factory.mktemp("sites") / "site", "rotator_foreign")
    try:
        started.add_to_settings((FILES / "settings.py").read_text())
        started.add_to_models((FILES / "models.py").read_text())
        shutil.copy(FILES / "cases.py", started.folder / "cases.py")
        started.run("python manage.py makemigrations shop && python manage.py migrate")
        yield started
    finally:
        with django_db_blocker.unblock():  # type: ignore[attr-defined] # pytest-django's own
            started.end()


def test_foreign_models(site: Site) -> None:
    said = site.run("python cases.py")
    results = [json.loads(line) for line in said.splitlines() if line.startswith('{"name"')]
    failed = [f"{result['name']}: {result['reason']}" for result in results if not result["passed"]]
    assert not failed, "\n".join(failed)
    assert len({result["model"] for result in results}) >= LEAST_MODELS
    assert "leaked" not in said


INTEGRATIONS = """
import hashlib, secrets
from shop.models import Integration
Integration.objects.bulk_create(
    Integration(
        name=f'Integration {i}', reference=secrets.token_urlsafe(), remarks='The customer has called. ' * 9,
        parameters={'url': 'https://example.org', 'credentials': {'api_key': secrets.token_hex()}},
        invoice_number=f'INV-2026-{i:08}', checksum=hashlib.sha256(str(i).encode()).hexdigest(),
    )
    for i in range(50)
)
"""


def test_find_secrets(site: Site) -> None:
    site.run(f"python manage.py shell -c {shlex.quote(INTEGRATIONS)}")
    found = json.loads(site.run("python manage.py find_secrets --json 2> /dev/null"))
    kinds = {column["column"]: column["kind"] for column in found["columns"]}
    secret = {label: kind for label, kind in kinds.items() if kind != "copy"}
    for expected in (KNOWN, UNKNOWN):
        missed = expected.keys() - secret.keys()
        assert len(missed) <= 0.05 * len(expected), f"missed {sorted(missed)}"
        wrong = {label for label in expected.keys() & secret.keys() if expected[label] != secret[label]}
        assert not wrong
    false = secret.keys() - KNOWN.keys() - UNKNOWN.keys()
    assert len(false) <= 0.2 * len(secret), f"false {sorted(false)}"
    assert {label for label, kind in kinds.items() if kind == "copy"} == COPIES
    assert not found["problems"]
    # Each column has a command, a reason why not, or an advice.
    assert all(column["command"] or column["refusal"] or column["advice"] for column in found["columns"])
    values = site.rows("SELECT reference FROM shop_integration")
    printed = site.run("python manage.py find_secrets") + json.dumps(found)
    assert not any(str(value) in printed for (value,) in values)
