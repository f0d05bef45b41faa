"""Packages of an extra are imported only where they are used."""

import subprocess
import sys

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.test import RequestFactory

import rotator.management
from rotator.views import metrics

_IMPORTING = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "core.settings"
import django
django.setup()
import rotator.admin, rotator.api, rotator.views, rotator.management.commands.async_rotate
sys.exit(any(name.partition(".")[0] == "prometheus_client" for name in sys.modules))
"""


def test_nothing_of_prometheus_is_imported_without_the_metrics() -> None:
    assert (
        subprocess.run([sys.executable, "-c", _IMPORTING], cwd=settings.BASE_DIR, check=False).returncode == 0
    )


def test_without_the_extra_the_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "rotator.management.metrics", raising=False)
    monkeypatch.delattr(rotator.management, "metrics", raising=False)
    with pytest.raises(ImproperlyConfigured, match="pip install 'prometheus-client"):
        metrics(RequestFactory().get("/metrics"))
