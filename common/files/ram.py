"""A folder in memory that ends with its process: how an adapter travels to another engine."""

import os
import pathlib
import shutil
import socket
import tempfile

from common.files.write import writing

DISK = "/dev/shm"
PREFIX = f"next-lora-{socket.gethostname()}-"  # containers may share the disk, not the processes


class RamDisk:
    """A new folder on the RAM disk, named after this process. Those of ended ones are removed.

    Where that has no room for `needed` bytes (in a container it may have 64 MB) it is on the disk.
    """

    def __init__(self, needed: int = 0):
        self.saved, place = 0, DISK
        if not os.path.isdir(DISK) or shutil.disk_usage(DISK).free < needed:
            place = tempfile.gettempdir()
        for left in pathlib.Path(place).glob(f"{PREFIX}[0-9]*"):
            try:
                os.kill(int(left.name.removeprefix(PREFIX).split("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except PermissionError:  # another user's process
                continue
        with writing(pathlib.Path(place, PREFIX)):
            self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place))

    def save(self, model) -> pathlib.Path:
        """Saves an adapter to a folder of a new name, and removes the one before it."""
        self.saved += 1
        folder = self.path / str(self.saved)
        with writing(folder):
            model.save_pretrained(folder, save_embedding_layers=False)
            shutil.rmtree(self.path / str(self.saved - 1), ignore_errors=True)
        return folder

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
