"""A web process with the metrics: ``python -m tests.acceptance.metrics_site`` prints its port and serves."""

import os
import sys
from wsgiref.simple_server import make_server

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    settings.ROOT_URLCONF = "tests.urls"
    django.setup()
    with make_server("127.0.0.1", 0, get_wsgi_application()) as server:
        sys.stdout.write(f"{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()
