"""A folder in memory that ends with its process: how an adapter travels to another engine."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile

from common.files.write import writing

DISK = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
PREFIX = "next-lora-"


class RamDisk:
    """A new folder on the RAM disk, locked by this process. Those of ended ones are removed."""

    def __init__(self):
        self.saved = 0
        for left in pathlib.Path(DISK).glob(f"{PREFIX}*"):
            _remove_if_dead(left)
        with writing(pathlib.Path(DISK, PREFIX)):
            self.path, self.lock = _locked_folder()

    def save(self, model) -> pathlib.Path:
        """Saves an adapter to a folder of a new name, and removes the one before it."""
        self.saved += 1
        folder = self.path / str(self.saved)
        with writing(folder):
            model.save_pretrained(folder, save_embedding_layers=False)
            shutil.rmtree(self.path / str(self.saved - 1), ignore_errors=True)
        return folder

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def _locked_folder() -> tuple[pathlib.Path, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=DISK)
        # Another process may take it for a dead one's before it is locked: then it is made anew.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(folder):
                return pathlib.Path(folder), lock
            os.close(lock)


def _remove_if_dead(folder: pathlib.Path) -> None:
    """Removes a folder of this user that no process has locked. Follows no symlink."""
    with contextlib.suppress(OSError):  # another user's, no folder, or locked: it stays
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(lock)
