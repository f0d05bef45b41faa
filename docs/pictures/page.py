"""Take the picture of a rotation's page, ``page.png``, with Chromium.

    .venv/bin/python manage.py migrate
    .venv/bin/python manage.py create_tickets --total 1000000
    .venv/bin/python docs/pictures/page.py

The rotation is that of ``make demo-page``. It is paused once, so that the chart has a band.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).parents[2]
DEMO = (sys.executable, "-m", "core.demo_page", "--port", "8123")
# Long enough for the chart to have a line on both sides of the pause.
MOVING_SECONDS, PAUSED_SECONDS = 40, 12
READ_SECONDS = 5
WIDTH, HEIGHT = 1000, 1250


def take(page: str, password: str) -> bytes:
    """Log in, pause the rotation once, and return the picture."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False},
        )
        driver.get(page)
        driver.find_element("name", "username").send_keys("demo")
        driver.find_element("name", "password").send_keys(password)
        driver.find_element("css selector", "[type=submit]").click()
        time.sleep(MOVING_SECONDS)
        for request, seconds in (("pause", PAUSED_SECONDS), ("resume", MOVING_SECONDS / 2)):
            driver.find_element("css selector", f"button[value={request}]").click()
            time.sleep(seconds)
        # Without the message about the last request.
        driver.get(page)
        time.sleep(READ_SECONDS)
        return driver.get_screenshot_as_png()
    finally:
        driver.quit()


def main() -> None:
    """Start the demo, and write the picture."""
    demo = subprocess.Popen(DEMO, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        page = demo.stdout.readline().strip()
        password = re.search(r"password (\S+)", demo.stdout.readline())[1]
        picture = take(page, password)
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait()
    (Path(__file__).parent / "page.png").write_bytes(picture)
    sys.stdout.write(f"page.png: {len(picture) / 1000:.1f} kB\n")


if __name__ == "__main__":
    main()
