"""Show the page of a rotation that takes some minutes: ``make demo-page``."""

import argparse
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Final

import django
from django.db import Error, connection

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")

# Small ranges: the rotation of a million rows takes some minutes.
_ROTATE: Final = ("async_rotate", "--noinput", "--restart", "--concurrency=2", "--batch=20", "--pace=gentle")
_ROTATION_WAIT_SECONDS: Final = 30.0
# What an application would do. The pace protects one that commits more than the rotation does.
_COMMITS_PER_SECOND: Final = 400


def main() -> int:
    """Start the site, a rotation and some load, print a login, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Show the page of a rotation that takes some minutes.")
    parser.add_argument("--port", type=int, default=8000, help="the site's port (default: %(default)s)")
    options = parser.parse_args()
    django.setup()
    password = _reset_user()
    threading.Thread(target=_commit_often, daemon=True).start()
    manage = [sys.executable, "manage.py"]
    # --insecure: the development server serves static files although DEBUG is off.
    serve = [*manage, "runserver", "--noreload", "--insecure", f"127.0.0.1:{options.port}"]
    with _started(serve) as site, _started([*manage, *_ROTATE]) as rotation:
        try:
            number = _wait_for_rotation(rotation)
            page = f"http://127.0.0.1:{options.port}/admin/rotator/rotation/{number}/change/"
            sys.stdout.write(f"{page}\nLog in as demo with the password {password} (for this demo only).\n")
            sys.stdout.write("Ctrl-C ends the site and the rotation.\n")
            sys.stdout.flush()
            site.wait()
        except KeyboardInterrupt:
            pass
        finally:
            for process in (rotation, site):
                process.terminate()
            _remove_user()
    return 0


def _started(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _reset_user() -> str:
    """Let the user ``demo`` log in with a new password, and return it."""
    from django.contrib.auth.models import User  # noqa: PLC0415 - after django.setup()

    password = secrets.token_urlsafe(9)
    user, _ = User.objects.get_or_create(username="demo", defaults={"is_staff": True, "is_superuser": True})
    user.set_password(password)
    user.save()
    return password


def _remove_user() -> None:
    from django.contrib.auth.models import User  # noqa: PLC0415 - after django.setup()

    with suppress(Error):
        User.objects.filter(username="demo").delete()


def _wait_for_rotation(rotation: "subprocess.Popen[bytes]") -> int:
    """Return the id of the rotation that has just begun."""
    until = time.monotonic() + _ROTATION_WAIT_SECONDS
    while time.monotonic() < until and rotation.poll() is None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT max(id) FROM rotator_rotation WHERE owner_pid = %s", (rotation.pid,))
            row = cursor.fetchone()
        if row and row[0]:
            return int(row[0])
        time.sleep(0.2)
    raise SystemExit("The rotation did not start. Run manage.py async_rotate to see why.")


def _commit_often() -> None:
    # The embedded server may end before this thread does.
    with suppress(Error), connection.cursor() as cursor:
        # A slow disk would leave few commits.
        cursor.execute("SET synchronous_commit = off")
        while True:
            cursor.execute("SELECT pg_logical_emit_message(true, 'demo', '')")
            time.sleep(1 / _COMMITS_PER_SECOND)


if __name__ == "__main__":
    sys.exit(main())
