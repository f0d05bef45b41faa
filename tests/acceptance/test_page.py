"""The page of a rotation in a real browser, under a strict Content-Security-Policy."""

import re
import shutil
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client, override_settings
from django.utils import timezone
from pytest_django.live_server_helper import LiveServer

from rotator.models import Control, Rotation
from rotator.postgres.owner import this_process
from tests.acceptance.audit import make_tickets, slow_down, speed_up
from tests.acceptance.harness import Commands, Running, number, wait_for_checkpoints, wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed.")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="There is no Chromium with its driver: install chromium-driver."
    ),
]

# A minute, if no test speeds it up.
ROWS = 40_000
TARGET = "tickets.Ticket.token"
_BUSY_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND application_name <> 'rotator'"
)


class Browser:
    """A Chromium that is logged in as alice."""

    def __init__(self, driver: Any, site: str) -> None:  # noqa: ANN401 - selenium ships no types that are checked here
        self.driver = driver
        self._site = site
        self.complaints: list[str] = []
        client = Client()
        client.force_login(User.objects.create_superuser("alice"))
        # A cookie needs a page of its site.
        driver.get(f"{site}/static/rotator/rotator.css")
        driver.add_cookie({"name": "sessionid", "value": client.cookies["sessionid"].value})

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self._site}/admin/rotator/rotation/{Rotation.objects.get().pk}/change/{query}")

    def open_tab(self) -> str:
        """Open the page in another tab, and return its name."""
        self.driver.switch_to.new_window("tab")
        self.open()
        return str(self.driver.current_window_handle)

    def find(self, selector: str) -> Any:  # noqa: ANN401
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str = "body") -> str:
        return str(self.find(selector).text)

    def wait_for(self, text: str, selector: str = "#rotator", *, seconds: float = 60) -> None:
        """Wait until the page shows a text, given as a regular expression."""

        def is_shown() -> bool:
            self.listen()
            shown = self.driver.execute_script(
                "return document.querySelector(arguments[0])?.textContent || ''", selector
            )
            return re.search(text, shown) is not None

        wait_until(is_shown, f"the page shows {text!r}", seconds=seconds)

    def press(self, request: str) -> None:
        self.find(f"button[name=request][value={request}]").click()

    def listen(self) -> None:
        """Keep what the browser has written to its console."""
        self.complaints += [each["message"] for each in self.driver.get_log("browser")]

    def close(self) -> None:
        """Close all tabs but one, which shows nothing then."""
        self.listen()
        first, *others = self.driver.window_handles
        for tab in others:
            self.driver.switch_to.window(tab)
            self.driver.close()
        self.driver.switch_to.window(first)
        self.driver.get("about:blank")
        # A request that the browser has given up would block the clearing of the tables.
        wait_until(lambda: number(_BUSY_SESSIONS) == 0, "the site has answered every request")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The project's site with the policy; a server reads the middleware only when it starts."""
    with override_settings(MIDDLEWARE=["tests.acceptance.strict_csp.strict_csp", *settings.MIDDLEWARE]):
        server = LiveServer("localhost")
    yield server.url
    server.stop()


@pytest.fixture
def browser(commands: Commands, driver: Any, site: str) -> Iterator[Browser]:  # noqa: ANN401, ARG001
    opened = Browser(driver, site)
    yield opened
    opened.close()
    assert [text for text in opened.complaints if "Content Security Policy" in text] == []
    assert [text for text in opened.complaints if "rotator.js" in text] == []


@pytest.fixture
def running(commands: Commands, browser: Browser) -> Running:  # noqa: ARG001 - browsers start slowly
    """A rotation that takes long."""
    make_tickets(ROWS)
    slow_down(0.4)
    started = commands.start("--batch=200", "--concurrency=2", "--pace=full")
    wait_for_checkpoints(2)
    return started


@pytest.fixture
def owned(browser: Browser) -> None:  # noqa: ARG001
    """A rotation that this process seems to own: its heartbeat is new for a minute."""
    owner = this_process()
    Rotation.objects.create(
        target=TARGET,
        database="default",
        started_xid=1,
        version="0",
        options={},
        rows_total=ROWS,
        owner_host=owner.host,
        owner_pid=owner.pid,
        owner_process=owner.process,
        owner_user=owner.user,
        updated_at=timezone.now() + timedelta(minutes=1),
    )


def test_it_is_watched_and_steered_to_its_end(browser: Browser, running: Running) -> None:
    browser.open()
    browser.wait_for("^Moving: ", "#rotator-headline")

    browser.press("pause")
    browser.wait_for("^Not moving: paused by alice", "#rotator-headline")
    browser.wait_for("paused: revision 1 by alice at .*, applied")

    browser.find("details:has(#rotator-pace) summary").click()
    browser.find("#rotator-workers").send_keys("1")
    browser.press("set")
    browser.wait_for("paused, concurrency 1: revision 2 by alice at .*, applied")

    browser.press("resume")
    browser.wait_for("^Moving: ", "#rotator-headline")
    speed_up()
    browser.wait_for("^Completed", "#rotator-headline")
    assert running.wait().status == 0
    assert browser.text("[data-text=percent]") == "100%"
    assert browser.text("[data-text=eta]") == "completed"
    assert "completed" in browser.text("[data-log]")


def test_it_is_cancelled(browser: Browser, running: Running) -> None:
    browser.open()
    browser.find("details:has(#rotator-target) summary").click()
    browser.find("#rotator-target").send_keys(TARGET)
    browser.press("cancel")
    browser.wait_for("^Not moving: interrupted, cancelled by alice", "#rotator-headline")
    browser.wait_for(f"async_rotate {TARGET} .*--batch 200 --pace full", ".rotator-command")
    assert "No process works on this rotation" in browser.text()
    assert running.wait().status == 130


@pytest.mark.usefixtures("owned")
def test_the_older_of_two_tabs_is_refused(browser: Browser) -> None:
    browser.open()
    older = browser.driver.current_window_handle
    browser.find("details:has(#rotator-pace) summary").click()
    browser.find("#rotator-workers").send_keys("1")
    browser.open_tab()
    browser.press("pause")
    browser.wait_for("paused by alice")
    # The older tab shows the pause, but its form is based on what it showed before.
    browser.driver.switch_to.window(older)
    browser.wait_for("^Not moving: paused by alice", "#rotator-headline")
    browser.press("set")
    browser.wait_for("alice has changed this rotation since you have seen it", ".messagelist")
    assert Control.objects.get().concurrency is None


def test_the_death_of_the_owner_is_shown(browser: Browser, running: Running) -> None:
    browser.open()
    browser.wait_for("^Moving: ", "#rotator-headline")
    running.kill()
    browser.wait_for("^Not moving: no heartbeat for ", "#rotator-headline", seconds=15)
    assert "has ended." in browser.text()
    assert not browser.find("button[value=pause]").is_displayed()


@pytest.mark.usefixtures("owned")
def test_it_works_without_scripts_and_on_a_small_screen(browser: Browser) -> None:
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open("?still")
        assert browser.text("#rotator-headline") == "Starting: the rate is not known yet"
        assert "This page does not reload." in browser.text()
        browser.press("pause")
        wait_until(lambda: Control.objects.filter(paused=True).exists(), "it is paused")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    browser.open()
    browser.wait_for("paused by alice", "#rotator-headline")
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
