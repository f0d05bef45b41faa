"""A web process as in production: a few threads serve all connections, which browsers keep.

``runserver`` has a thread for each browser, and so a connection to the database. Other servers do not.
The parser of requests is that of ``runserver``, which is slower than that of other servers.
"""

import logging
import os
import select
import socket
import sys
import threading
from importlib import import_module
from typing import Final

# What Django itself costs: a constant answer, which needs the admin's login.
LOGIN_ONLY: Final = "login-only/"
_THREADS: Final = 2
_ONCE: Final = select.EPOLLIN | select.EPOLLONESHOT


def main() -> None:
    """Serve the project of ``DJANGO_SETTINGS_MODULE`` on the port of the first argument."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    from django.conf import settings  # noqa: PLC0415
    from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler  # noqa: PLC0415
    from django.core.wsgi import get_wsgi_application  # noqa: PLC0415

    class Browser(WSGIRequestHandler):
        """A connection, of which a thread serves one request at a time."""

        disable_nagle_algorithm = True

        def handle(self) -> None:
            """Wait for the first request."""

        def finish(self) -> None:
            """Stay open."""

    server = ThreadedWSGIServer(("127.0.0.1", int(sys.argv[1])), Browser)
    server.set_app(get_wsgi_application())
    from django.contrib.admin.sites import site  # noqa: PLC0415 - after the set-up
    from django.http import HttpResponse  # noqa: PLC0415
    from django.urls import path  # noqa: PLC0415

    login_only = site.admin_view(lambda _: HttpResponse(b" " * 4000, content_type="application/json"))
    import_module(settings.ROOT_URLCONF).urlpatterns.insert(0, path(LOGIN_ONLY, login_only))
    # Servers in production write no log of requests, unless they are asked to.
    logging.getLogger("django.server").setLevel(logging.ERROR)
    ready, browsers = select.epoll(), dict[int, tuple[socket.socket, Browser]]()
    ready.register(server.fileno(), _ONCE)

    def serve() -> None:
        while True:
            for number, _ in ready.poll(maxevents=1):
                if number == server.fileno():
                    connection, address = server.get_request()
                    browsers[connection.fileno()] = connection, Browser(connection, address, server)
                    ready.register(connection.fileno(), _ONCE)
                    ready.modify(number, _ONCE)
                    continue
                connection, browser = browsers[number]
                browser.close_connection = True
                browser.handle_one_request()
                if browser.close_connection:
                    del browsers[number]
                    ready.unregister(number)
                    connection.close()
                else:
                    ready.modify(number, _ONCE)

    for _ in range(_THREADS - 1):
        threading.Thread(target=serve, daemon=True).start()
    serve()


if __name__ == "__main__":
    main()
