"""The ServerApp: Flower starts it in a process of its own; it works through one run of ours."""

from __future__ import annotations

import logging
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import IsthmusError, LedgerError, StorageError, TransportError
from common.flower import RUN_KEY
from common.guard import check_imports
from server.federation import StoppedError
from server.home import ServerHome
from server.rounds import execute
from server.runs import FAILED, STOPPED
from server.withdrawal import execute_withdrawal

log = logging.getLogger(__name__)
LOCK_TRIES = 20

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Work on the run that `isthmus-run` names. A failure that trying again cannot mend ends the run."""
    check_imports()
    home = ServerHome.from_environment()
    run = home.runs.get(str(context.run_config[RUN_KEY]))
    logging.basicConfig(
        filename=run.folder / "server.log",
        level=logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every poll
    for _ in range(LOCK_TRIES):
        with run.working() as free:
            if not free:
                time.sleep(0.5)
                continue
            if run.is_final:
                return
            try:
                work = execute_withdrawal if run.spec.withdrawal else execute
                work(grid, home, run)
            except StoppedError:
                home.store.close_run(run.spec.run_id)
                run.set_state(STOPPED, reason="stopped by the operator")
            except (StorageError, LedgerError, TransportError):
                raise  # the run stays open: it goes on once the disk or the link is back
            except IsthmusError as err:
                log.exception("the run failed")
                home.store.close_run(run.spec.run_id)
                run.set_state(FAILED, reason=str(err))
            return
    log.warning("%s is being worked on by another process", run.spec.run_id)
