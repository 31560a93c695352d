"""The owner runner: takes tasks from the SuperNode on this host and answers with installed code only.

For each task it checks the SHA-256 of the app bundle against the owner's allow list, calls the installed
ClientApp (the bundle is never unpacked), and pushes the reply that passed the egress gate. Before it
takes the first task it finishes the order that a killed runner left behind.

    python -m clients.runner HOME
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from clients.actions import Actions
from clients.app import HOME_VARIABLE, answer, app
from clients.flower import Task, TaskSource
from clients.home import ClientHome
from common.guard import check_imports
from common.orders import REFUSED

log = logging.getLogger(__name__)
POLL_S = 0.5
RETRY_S = 2.0


def handle(task: Task, home: ClientHome) -> None:
    """Answer one task: the installed app's reply if the bundle is approved, a refusal otherwise."""
    if task.fab_sha256 in home.config.approved_fabs:
        task.reply(app(task.message, task.context))
        return
    log.error("app bundle %s is not approved", task.fab_sha256)
    reply = home.gate.release_reply({"status": REFUSED, "code": "bundle-not-approved"})
    task.reply(Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=task.message))


def finish_left_behind(home: ClientHome) -> None:
    """Carry out the orders that were accepted and not finished when the last runner ended."""
    actions = Actions(home)
    for envelope in actions.unfinished():
        log.info("finishing an order that was left behind")
        outcome = answer(home, actions, envelope)
        log.info("it ended as %s (%s)", outcome["status"], outcome["code"])


def main(path: str) -> None:
    """Serve tasks until the process is told to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    check_imports()
    os.environ[HOME_VARIABLE] = path
    home = ClientHome(Path(path))
    secret = (home.keys / "superexec.secret").read_bytes()
    source = TaskSource(f"127.0.0.1:{home.config.supernode_port}", secret)
    finish_left_behind(home)
    log.info("%s is ready", home.config.domain)
    while True:
        try:
            task = source.acquire()
        except Exception as err:  # noqa: BLE001 - Flower raises httpx's errors and its own
            log.warning("no task from the SuperNode: %s", type(err).__name__)
            time.sleep(RETRY_S)
            continue
        if task is None:
            time.sleep(POLL_S)
            continue
        try:
            handle(task, home)
        except Exception:
            log.exception("a task was not answered")  # Flower reports it as failed, without our text
        finally:
            task.close()


if __name__ == "__main__":
    main(sys.argv[1])
