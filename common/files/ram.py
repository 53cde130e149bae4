"""A folder in memory that ends with its process: how an adapter travels to another engine."""

import os
import pathlib
import shutil
import socket
import tempfile

from common.files.write import writing

DISK = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
PREFIX = f"next-lora-{socket.gethostname()}-"  # containers may share the disk, not the processes


class RamDisk:
    """A new folder on the RAM disk, named after this process. Those of ended ones are removed."""

    def __init__(self):
        self.saved = 0
        for left in pathlib.Path(DISK).glob(f"{PREFIX}[0-9]*"):
            try:
                os.kill(int(left.name.removeprefix(PREFIX).split("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except PermissionError:  # another user's process
                continue
        with writing(pathlib.Path(DISK, PREFIX)):
            self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=DISK))

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
