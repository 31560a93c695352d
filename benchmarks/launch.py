"""Run one command on processor CPU ("any": on all) and print its seconds and peak memory as JSON.

    python -I -S launch.py LOG CPU COMMAND...    # the command's output goes to LOG

A process of its own, because Linux lets a child's peak memory begin at that of the process that started it:
this one is small (some 10 MB), the benchmark is not. Imports nothing outside the standard library.
"""

import json
import os
import sys
import time


def main(log: str, cpu: str, *command: str) -> None:
    """Start, wait, print."""
    if cpu != "any":
        os.sched_setaffinity(0, {int(cpu)})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    streams = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    started_s = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=streams)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started_s
    found = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "code": os.waitstatus_to_exitcode(status),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
