"""A stranger's project, docs/install.md word for word, and models that no one here wrote."""

import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.harness import PROJECT
from tests.acceptance.installed import Environment, Site, blocks, copy_of_this_repository, empty_database

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]

PACKAGES = "djangorestframework django-rest-knox django-oauth-toolkit mypy django-stubs"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_this_repository(tmp_path_factory.mktemp("clones") / "clone")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Environment:
    """As the first two blocks of docs/install.md make it."""
    new_values = Environment.make(tmp_path_factory.mktemp("environments") / "venv")
    build, install, *_ = blocks("sh")
    new_values.run(build, cwd=clone)
    new_values.run(install, cwd=clone)
    return new_values


@pytest.fixture
def site(environment: Environment, tmp_path: Path) -> Iterator[Site]:
    started = Site.start(environment, tmp_path / "site", "rotator_stranger")
    yield started
    started.end()


@pytest.mark.usefixtures("environment")
def test_the_wheel_holds_the_reusable_app_alone(clone: Path) -> None:
    (wheel,) = (clone / "dist").iterdir()
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = opened.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"rotator"}
    assert {"rotator/py.typed", "rotator/migrations/0001_initial.py", "rotator/apps.py"} <= set(names)
    assert "Classifier: Framework :: Django" in metadata
    assert "# Changelog" in metadata
    needed = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert not [line for line in needed if "dj-database-url" in line or "embedded" in line]


def test_the_extra_for_celery_can_be_installed_as_the_guide_says(
    environment: Environment, clone: Path
) -> None:
    install, *_ = blocks("sh", guide="celery.md")
    said = environment.run(install.replace("pip install", "pip install --dry-run"), cwd=clone)
    assert "Would install" in said
    assert "celery" in said.lower()


def test_no_advice_names_an_index_that_has_no_such_package() -> None:
    guides = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *(PROJECT / "rotator").rglob("*.py")]
    named = [guide.name for guide in guides if "install 'django-async-rotator" in guide.read_text()]
    assert named == []


def test_the_guide_word_for_word(site: Site) -> None:
    site.add_to_models(
        "import secrets\n\nclass Order(models.Model):\n"
        "    api_key = models.CharField(max_length=60, unique=True, default=secrets.token_urlsafe)\n"
    )
    site.run("python manage.py makemigrations shop && python manage.py migrate")
    site.run(
        'python manage.py shell -c "from shop.models import Order;'
        ' Order.objects.bulk_create(Order() for _ in range(5000))"'
    )
    setting, *_ = blocks("python")
    site.add_to_settings(setting)
    _, _, migrate, dry_run, rotate = blocks("sh")
    assert "no issues" in site.run(migrate)
    assert "Consequences:" in site.run(dry_run)
    site.assert_rotated("shop_order", ["api_key"], lambda: site.run(rotate))
    assert "completed" in site.run("python manage.py rotations")
    assert site.rows("SELECT sum(rows)::integer FROM rotator_completedrange") == [(5000,)]


def test_the_readme_word_for_word_on_another_server(environment: Environment, tmp_path: Path) -> None:
    text = (PROJECT / "README.md").read_text()
    section = text.split("## Use it on your own server")[1].split("\n## ")[0]
    script = "\n".join(re.findall(r"^ {4}(.*)$", section, re.MULTILINE))
    with empty_database("rotator_reader") as url:
        script = re.sub(r"(?<=DATABASE_URL=)\S+", f"'{url}'", script)
        script = script.replace("migrate\n", "migrate\npython manage.py create_tickets --total 6000\n")
        said = environment.run(script, cwd=copy_of_this_repository(tmp_path / "clone"))
    assert "Consequences:" in said
    assert "keys         up to [5000]" in said
    assert re.search(r"Completed: rotation \d+ gave 6,000 rows of tickets\.Ticket\.token a new value\.", said)


def test_a_data_migration_rotates(site: Site) -> None:
    site.add_to_models(
        "import secrets\n\nclass Order(models.Model):\n"
        "    api_key = models.CharField(max_length=60, default=secrets.token_urlsafe)\n"
    )
    site.add_to_settings('INSTALLED_APPS += ["rotator"]')
    site.run("python manage.py makemigrations shop && python manage.py migrate")
    site.run(
        'python manage.py shell -c "from shop.models import Order;'
        ' Order.objects.bulk_create(Order() for _ in range(500))"'
    )
    (site.folder / "shop" / "migrations" / "0002_rotate.py").write_text(
        "from django.db import migrations\n"
        "from rotator.api import Target, rotate_sync\n\n\n"
        "def rotate(apps, schema_editor):\n"
        "    rotate_sync(Target('shop.Order.api_key'))\n\n\n"
        "class Migration(migrations.Migration):\n"
        "    atomic = False\n"
        "    dependencies = [('shop', '0001_initial'), ('rotator', '0004_table_name')]\n"
        "    operations = [migrations.RunPython(rotate)]\n"
    )
    site.assert_rotated("shop_order", ["api_key"], lambda: site.run("python manage.py migrate"))


@pytest.fixture(scope="module")
def with_packages(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The same with what others wrote."""
    environment.run(f"pip install {PACKAGES}", cwd=tmp_path_factory.mktemp("anywhere"))
    return environment


PROGRAM = """
import asyncio

from rotator.api import RotationUnfinishedError, Target, rotate, rotate_sync
from rotator.exceptions import RotatorError
from rotator.events import Event, RangeCompleted, RotationStopped


def tell(event: Event) -> None:
    if isinstance(event, RangeCompleted):
        print(event.rows)


async def main() -> int:
    target = Target("shop.Order.api_key", filters=["status=active"], generator="shop.keys.make")
    try:
        stopped: RotationStopped = await rotate(target, concurrency=8, batch=1000, observer=tell)
    except RotationUnfinishedError as error:
        return error.stopped.rows
    except RotatorError as error:
        return error.exit_status
    return stopped.rows


print(asyncio.run(main()), rotate_sync(Target(["shop.Order.api_key", "shop.Order.secret"])).rows)
"""


def test_a_program_that_uses_the_api_is_typed(with_packages: Environment, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    assert "Success" in with_packages.run("mypy --strict program.py", cwd=tmp_path)
    (tmp_path / "wrong.py").write_text(PROGRAM.replace("concurrency=8", 'concurrency="8"'))
    assert '"concurrency"' in with_packages.run("mypy --strict wrong.py", cwd=tmp_path, status=1)


FILL = """
from datetime import timedelta
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.utils import timezone
from knox.models import AuthToken
from oauth2_provider.models import AccessToken, Application, RefreshToken
from rest_framework.authtoken.models import Token

later = timezone.now() + timedelta(days=1)
users = [User.objects.create(username=f'user {i}', password=f'leaked {i}') for i in range(60)]
for user in users:
    Session.objects.create(session_key=f'leaked{user.pk}', session_data='leaked', expire_date=later)
    Token.objects.create(user=user)
    AuthToken.objects.create(user)
    application = Application.objects.create(
        user=user, client_type='confidential', authorization_grant_type='password'
    )
    token = AccessToken.objects.create(user=user, token=f'leaked {user.pk}', expires=later)
    RefreshToken.objects.create(user=user, token=f'leaked {user.pk}', application=application)
"""

GENERATORS = """
import hashlib
import secrets

from django.contrib.auth.hashers import make_password


def access_token():
    token = secrets.token_urlsafe(24)
    return {"token": token, "token_checksum": hashlib.sha256(token.encode()).hexdigest()}


def client_secret():
    return {"client_secret": make_password(secrets.token_urlsafe(24), hasher="md5")}


def unusable_password(user):
    return f"!{user.pk}-{secrets.token_hex(16)}"


def knox_token():
    token = secrets.token_hex(32)
    return {"digest": hashlib.sha512(token.encode()).hexdigest(), "token_key": token[:15]}
"""


@pytest.fixture
def crowded(with_packages: Environment, tmp_path: Path) -> Iterator[Site]:
    """A project with tables of Django, knox, oauth-toolkit and the REST framework."""
    site = Site.start(with_packages, tmp_path / "site", "rotator_crowded")
    try:
        site.add_to_settings(
            "INSTALLED_APPS += ['rotator', 'rest_framework', 'rest_framework.authtoken', 'knox',"
            " 'oauth2_provider']\n"
            "PASSWORD_HASHERS = ['django.contrib.auth.hashers.MD5PasswordHasher']\n"
        )
        (site.folder / "shop" / "keys.py").write_text(GENERATORS)
        (site.folder / "fill.py").write_text(FILL)
        site.run("python manage.py migrate && python manage.py shell < fill.py")
        yield site
    finally:
        site.end()


def test_models_that_no_one_here_wrote(crowded: Site) -> None:
    def rotate(*words: str) -> None:
        said = crowded.run(f"python manage.py async_rotate {' '.join(words)} --batch 20")
        assert "leaked" not in said

    def refused(*words: str) -> str:
        said = crowded.run(f"python manage.py async_rotate {' '.join(words)}", status=1)
        return " ".join(said.split())

    # The key is the primary key.
    for label in ("authtoken.Token.key", "sessions.Session.session_key", "knox.AuthToken.digest"):
        said = refused(label)
        assert "is the primary key" in said
        assert "delete the rows, and let the application make new ones" in said

    assert "has no default" in refused("auth.User.password")
    crowded.assert_rotated(
        "auth_user",
        ["password"],
        lambda: rotate("auth.User.password", "--generator", "shop.keys.unusable_password"),
    )

    assert "is a TokenChecksumField" in refused(
        "oauth2_provider.AccessToken.token", "--generator", "secrets.token_urlsafe"
    )
    crowded.assert_rotated(
        "oauth2_provider_accesstoken",
        ["token", "token_checksum"],
        lambda: rotate(
            "oauth2_provider.AccessToken.token",
            "oauth2_provider.AccessToken.token_checksum",
            "--generator",
            "shop.keys.access_token",
        ),
    )
    for token, checksum in crowded.rows("SELECT token, token_checksum FROM oauth2_provider_accesstoken"):
        assert hashlib.sha256(str(token).encode()).hexdigest() == checksum

    assert "is a ClientSecretField, which transforms" in refused("oauth2_provider.Application.client_secret")
    crowded.assert_rotated(
        "oauth2_provider_application",
        ["client_secret"],
        lambda: rotate("oauth2_provider.Application.client_secret", "--generator", "shop.keys.client_secret"),
    )
