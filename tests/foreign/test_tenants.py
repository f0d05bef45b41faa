"""A project with a schema for each tenant: one tenant, all tenants, and the tables that they share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.installed import Environment, Site, copy_of_this_repository
from tests.foreign import READY_MADE

pytestmark = [pytest.mark.foreign, pytest.mark.django_db(transaction=True)]

SETTINGS = """
DATABASES['default']['ENGINE'] = 'django_tenants.postgresql_backend'
DATABASE_ROUTERS = ['django_tenants.routers.TenantSyncRouter']
SHARED_APPS = ['django_tenants', 'customers', 'rotator', *(app for app in INSTALLED_APPS if app != 'shop')]
TENANT_APPS = ['django.contrib.contenttypes', 'shop']
INSTALLED_APPS = [*SHARED_APPS, 'shop']
TENANT_MODEL = 'customers.Customer'
TENANT_DOMAIN_MODEL = 'customers.Domain'
"""
CUSTOMERS = """
import secrets
from django.db import models
from django_tenants.models import DomainMixin, TenantMixin

class Customer(TenantMixin):
    token = models.CharField(max_length=64, default=secrets.token_hex)

class Domain(DomainMixin):
    pass
"""
ORDERS = """
import secrets

class Order(models.Model):
    api_key = models.CharField(max_length=64, default=secrets.token_hex)
"""
FILL = """
from customers.models import Customer
from django_tenants.utils import schema_context
from shop.models import Order
for name in ('one', 'two'):
    Customer.objects.create(schema_name=name)
    with schema_context(name):
        Order.objects.bulk_create(Order(api_key=f'leaked {i}') for i in range(30))
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if ready_made := os.environ.get(READY_MADE):
        environment = Environment(Path(ready_made))
    else:
        environment = Environment.make(tmp_path / "venv")
        environment.run("pip install 'Django~=5.2.0' django-tenants", cwd=tmp_path)
    clone = copy_of_this_repository(tmp_path / "clone")
    environment.run("pip install --force-reinstall --no-deps . && pip install .", cwd=clone)
    started = Site.start(environment, tmp_path / "site", "rotator_tenants")
    try:
        started.run("python manage.py startapp customers")
        (started.folder / "customers" / "models.py").write_text(CUSTOMERS)
        started.add_to_models(ORDERS)
        started.add_to_settings(SETTINGS)
        (started.folder / "fill.py").write_text(FILL)
        started.run(
            "python manage.py makemigrations customers shop && python manage.py migrate_schemas --shared"
        )
        started.run("python manage.py shell < fill.py")
        yield started
    finally:
        started.end()


def leaked(site: Site) -> list[object]:
    return [
        site.rows(f"SELECT count(*) FROM {schema}.shop_order WHERE api_key LIKE 'leaked%'")[0][0]
        for schema in ("one", "two")
    ]


def test_tenants(site: Site) -> None:
    label = "shop.Order.api_key"
    said = site.run(f"python manage.py tenant_command async_rotate {label} --schema=one")
    assert leaked(site) == [0, 30]
    assert "two.shop_order" in said
    site.run(f"python manage.py all_tenants_command async_rotate {label} --restart --noinput")
    assert leaked(site) == [0, 0]
    assert site.rows("SELECT table_name, status FROM rotator_rotation ORDER BY id") == [
        ("one.shop_order", "completed"),
        ("one.shop_order", "completed"),
        ("two.shop_order", "completed"),
    ]
    before = site.rows("SELECT token FROM customers_customer ORDER BY id")
    site.run("python manage.py async_rotate customers.Customer.token")
    assert set(before).isdisjoint(site.rows("SELECT token FROM customers_customer"))
