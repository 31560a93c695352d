"""The import guard: our generic names must be our own code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import guard
from common.errors import FederationError

ROOT = Path(guard.__file__).parent.parent


def test_our_own_installation_passes() -> None:
    guard.check_imports()


@pytest.mark.parametrize("package", ["server", "clients", "simulations"])
def test_a_folder_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(FederationError, match=f"'{package}' resolves to {tmp_path}"):
        guard.check_imports()


def test_a_package_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "OURS", ("common", "isthmus_absent"))
    with pytest.raises(FederationError, match="resolves to nothing"):
        guard.check_imports()


def test_a_shadow_on_pythonpath_stops_a_process(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('shadow code ran')")
    code = "from common.guard import check_imports; check_imports()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "outside our installation" in done.stderr
    assert "shadow code ran" not in done.stderr
