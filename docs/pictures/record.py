"""Record two runs of ``async_rotate`` in a real terminal, and write them as the animated picture ``run.svg``.

    make demo COUNT=1000000
    .venv/bin/python docs/pictures/record.py

The terminal is tmux. The first run is stopped by Ctrl-C, the second one resumes it.
"""

import os
import subprocess
import sys
import time
from html import escape
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
TMUX = ("tmux", "-L", "rotator-picture")
COLUMNS, LINES = 108, 26
TICK_SECONDS = 0.4
PAUSE_TICKS, END_TICKS = 8, 12
COMMAND = "python manage.py async_rotate --noinput --no-preflight"
STOP_AT_PERCENT = 40
TOP, LINE_HEIGHT, CHARACTER_WIDTH, MARGIN = 52, 19, 8.43, 16

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"
viewBox="0 0 {width} {height}" role="img" aria-label="A terminal: a rotation is stopped and resumed">
<rect width="{width}" height="{height}" rx="8" fill="var(--paper)"/>
<g fill="var(--edge)">
<circle cx="20" cy="18" r="6"/><circle cx="40" cy="18" r="6"/><circle cx="60" cy="18" r="6"/></g>"""
END = "</svg>\n"
STYLE = """\
svg{--paper:#f6f8fa;--ink:#1f2328;--edge:#d1d9e0;--bar:#1a7f37}
@media(prefers-color-scheme:dark){svg{--paper:#16181d;--ink:#e6e6e6;--edge:#3d444d;--bar:#57ab5a}}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:var(--ink);
white-space:pre;visibility:hidden;animation:SECONDSs step-end infinite}
.b{fill:var(--bar)}
@media(prefers-reduced-motion:reduce){text{animation:none!important}.e{visibility:visible}}
"""


def environment() -> dict[str, str]:
    """Return the environment of a terminal that uses the embedded server."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "TMUX")}
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "PS1": "$ ", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}


def tmux(*words: str) -> str:
    """Run a command of tmux and return its output."""
    return subprocess.run(
        [*TMUX, *words], check=True, env=environment(), capture_output=True, text=True
    ).stdout


def screen() -> list[str]:
    """Return the lines of the terminal."""
    return [line.rstrip() for line in tmux("capture-pane", "-p").splitlines()]


def record() -> list[list[str]]:
    """Run the command twice, and return what the terminal showed at each tick."""
    frames = []
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "PS1='$ ' bash --norc --noprofile")
    try:
        time.sleep(TICK_SECONDS)
        for run in ("stopped", "resumed"):
            tmux("send-keys", COMMAND, "Enter")
            can_stop = run == "stopped"
            is_running = True
            while is_running:
                time.sleep(TICK_SECONDS)
                frames.append(screen())
                if can_stop and max(map(percent, frames[-1])) >= STOP_AT_PERCENT:
                    tmux("send-keys", "C-c")
                    can_stop = False
                is_running = [line for line in frames[-1] if line][-1] != "$"
            frames += [frames[-1]] * PAUSE_TICKS
    finally:
        tmux("kill-server")
    return frames


def percent(line: str) -> int:
    """Return the percent of a line of the bar; 0 for other lines."""
    words = line.partition("%")[0].split()
    return int(words[-1]) if line.startswith("|") and words[-1].isdigit() else 0


def svg(frames: list[list[str]]) -> str:
    """Return the picture: each text of each line is shown from one tick to another."""
    frames = [*frames, *[frames[-1]] * END_TICKS]
    total = len(frames)
    lines = []
    lengths = set()
    for row in range(LINES):
        texts = [frame[row] if row < len(frame) else "" for frame in frames]
        for text, group in groupby(range(total), key=texts.__getitem__):
            ticks = list(group)
            if text:
                lengths.add(len(ticks))
                lines.append(text_element(row, text, ticks, is_last=ticks[-1] == total - 1))
    rules = [
        f"@keyframes k{length}{{0%{{visibility:visible}}{100 * length / total:.2f}%{{visibility:hidden}}}}"
        for length in sorted(lengths)
    ]
    width, height = round(COLUMNS * CHARACTER_WIDTH) + 2 * MARGIN, TOP + LINES * LINE_HEIGHT
    style = STYLE.replace("SECONDS", f"{total * TICK_SECONDS:.1f}")
    return "\n".join(
        [HEAD.format(width=width, height=height), "<style>", style, *rules, "</style>", *lines, END]
    )


def text_element(row: int, text: str, ticks: list[int], *, is_last: bool) -> str:
    """Return the element that shows a text in one line of the terminal for some ticks."""
    classes = f"{'b' if text.startswith('|') else ''}{' e' if is_last else ''}"
    return (
        f'<text x="{MARGIN}" y="{TOP + row * LINE_HEIGHT}" class="{classes}" '
        f'style="animation-name:k{len(ticks)};animation-delay:{ticks[0] * TICK_SECONDS:.1f}s" '
        f'textLength="{len(text) * CHARACTER_WIDTH:.0f}" lengthAdjust="spacingAndGlyphs">'
        f"{escape(text)}</text>"
    )


def main() -> None:
    """Forget earlier rotations of the tickets, record, and write the picture."""
    forget = "from rotator.models import Rotation; Rotation.objects.all().delete()"
    subprocess.run(
        [sys.executable, "manage.py", "shell", "-c", forget], check=True, cwd=ROOT, env=environment()
    )
    os.chdir(ROOT)
    picture = svg(record())
    (Path(__file__).parent / "run.svg").write_text(picture)
    sys.stdout.write(f"run.svg: {len(picture) / 1000:.1f} kB\n")


if __name__ == "__main__":
    main()
