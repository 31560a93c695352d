"""The long run sees what it is for: another error, a process that dies, an input without end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import json, os, time
    from common.errors import ParcelError
    from fuzz import decoders, long

    def bad(read):
        return lambda folder: decoders.Decoder((b"x",), read)

    def raises(data):
        raise {"ValueError": ValueError("x"), "ParcelError": ParcelError("x")}[what]

    first = True
    def once(call):
        def read(data):
            global first
            if not first:
                call()
            first = False
        return read

    long.LIMIT_S = 1.0
    found = {}
    for what, read in {
        "ValueError": once(lambda: raises(b"")), "ParcelError": once(lambda: raises(b"")),
        "death": once(lambda: os._exit(9)), "hang": once(lambda: time.sleep(60)),
    }.items():
        decoders.DECODERS["bad"] = bad(read)
        figures = long.run("bad", 1, 4.0)
        found[what] = [figures.crashes > 0, figures.refused > 0, *figures.crashed[:1]]
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_crashes_deaths_and_hangs_are_counted() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(said)
    assert found["ParcelError"] == [False, True]
    assert found["ValueError"][:2] == [True, False]
    assert "ValueError" in found["ValueError"][2]
    assert "the process ended (9)" in found["death"][2]
    assert "took more than 1 s" in found["hang"][2]
