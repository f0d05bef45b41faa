"""Rotations in the admin: users with the permission can view them, and no user can change them."""

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from rotator.models import Rotation

pytestmark = pytest.mark.django_db


@pytest.fixture
def rotation() -> Rotation:
    return Rotation.objects.create(
        target="shop.Order.api_key",
        table_name="public.shop_order",
        database="default",
        started_xid=1,
        version="0",
        rows_done=12_000,
        rows_total=34_000,
        owner_user="app",
        owner_host="db1",
        owner_pid=42,
    )


@pytest.fixture
def admin(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("admin"))
    return client


def test_the_list_shows_how_far_each_is(admin: Client, rotation: Rotation) -> None:
    page = admin.get(reverse("admin:rotator_rotation_changelist"), {"q": "api_key"}).content.decode()
    for fact in (str(rotation.pk), "shop.Order.api_key", "12,000 of 34,000", "app on db1 (pid 42)"):
        assert fact in page


def test_one_is_shown_and_not_changed(admin: Client, rotation: Rotation) -> None:
    url = reverse("admin:rotator_rotation_change", args=[rotation.pk])
    page = admin.get(url).content.decode()
    assert "shop.Order.api_key" in page
    assert 'name="_save"' not in page
    assert admin.post(url, {"target": "other"}).status_code == 403
    assert admin.get(reverse("admin:rotator_rotation_add")).status_code == 403
    assert admin.post(reverse("admin:rotator_rotation_delete", args=[rotation.pk])).status_code == 403
    assert Rotation.objects.get() == rotation
