"""A browser without a window, steered over its debugging pipe: pages as a reader sees them.

Any Chromium takes part; nothing is needed beside it. ``make docs-test`` installs one, see ``find_browser``.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-browser" / "chromium"
"""The place where ``make docs-test`` puts it, with ``lib`` and ``fonts`` for machines that have none."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
# Moves the ends of two pipes to where the browser looks for them.
EXEC = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def find_browser() -> Path | None:
    """The one of ``make docs-test``, else one on the path."""
    if INSTALLED.is_file():
        return INSTALLED
    return next((Path(found) for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Tab:
    """One page after another, and what the browser complained about."""

    read_fd: int
    write_fd: int
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    """Messages to the console that are errors, exceptions of scripts, and answers of 400 and above."""
    num_sent: int = 0
    received: bytes = b""

    def open(self, url: str) -> None:
        """Load a page, until it has loaded all that it shows."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, script: str, limit_s: float = 30) -> Any:
        """Ask until the answer is true, or of some length."""
        until = time.monotonic() + limit_s
        while not (value := self.ask(script)):
            if time.monotonic() > until:
                raise TimeoutError(f"{script} is {value!r} after {limit_s} s; complaints: {self.complaints}")
            time.sleep(0.05)
        return value

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the debugging protocol; notes complaints that come before its answer."""
        self.num_sent += 1
        message = {"id": self.num_sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.num_sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            part = os.read(self.read_fd, 2**20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, of: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(of["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and of["type"] == "error":
            self.complaints.append(str(of["args"]))
        elif event == "Log.entryAdded" and of["entry"]["level"] == "error":
            self.complaints.append(f"{of['entry']['text']} {of['entry'].get('url', '')}")
        elif event == "Network.responseReceived" and of["response"]["status"] >= 400:
            self.complaints.append(f"{of['response']['status']} {of['response']['url']}")
        elif event == "Network.loadingFailed" and not of.get("canceled"):
            self.complaints.append(f"{of['errorText']} {of['type']}")


@contextmanager
def open_tab(browser: Path, profile: Path) -> Iterator[Tab]:
    """Start a browser with an empty tab; ends it."""
    env = os.environ | {"HOME": str(profile)}
    if (libraries := browser.parent / "lib").is_dir():
        env["FONTCONFIG_PATH"] = str(browser.parent / "fonts")
        env["LD_LIBRARY_PATH"] = f"{libraries}:{env.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    pipes = [os.pipe(), os.pipe()]
    (its_read, our_write), (our_read, its_write) = pipes
    passed = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_read, its_write)]  # not 3 or 4, which EXEC fills
    os.close(its_read), os.close(its_write)
    command = [str(browser), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", EXEC, *map(str, passed), *command],
        pass_fds=passed,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in passed:
        os.close(end)
    try:
        tab = Tab(our_read, our_write)
        target = tab.call("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        yield tab
        tab.session = ""
        tab.call("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(our_read)
        os.close(our_write)
