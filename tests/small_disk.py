"""A disk that is soon full, for whatever writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


class SmallDisk:
    """A disk of two megabytes that other processes of the test see at `folder` while they run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder.with_name(f"{folder.name}.kept")
        """`kept` gets a copy of what was on the disk when a process ended."""

    def run(self, *command: str) -> list[str]:
        """Run Python with these arguments and the disk at hand; the lines that it prints."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = self._run([sys.executable, *command], env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def works(self) -> bool:
        """Whether this system lets a process mount one."""
        return shutil.which("unshare") is not None and self._run(["true"], None).returncode == 0

    def _run(self, command: list[str], env: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(self.kept, ignore_errors=True)
        inside = 'mount -t tmpfs -o size=2m tmpfs "$0" && "$@" && cp -r "$0" "$0.kept"'
        within = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, str(self.folder)]
        return subprocess.run([*within, *command], capture_output=True, text=True, env=env, check=False)
