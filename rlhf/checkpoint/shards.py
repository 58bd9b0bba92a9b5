"""Checkpoint directories of ``trainer=fsdp``, read without running code that they may contain.

PyTorch stores the index of such a directory, and every value that is not a tensor, as a pickle.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from rlhf.errors import DataError

INDEX = ".metadata"
_REPLACE = "Use a checkpoint that a run of this project wrote, or start over: resume=false"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


def load_shards(state: dict[str, Any], directory: Path) -> None:
    """Load a checkpoint directory into a state dictionary in place. All ranks call this function.

    Raises:
        DataError: The directory is not a valid checkpoint, or it contains anything but plain data.
    """
    ShardReader(directory).read_metadata()  # PyTorch would report an error in it as an AssertionError.
    try:
        load(state, storage_reader=ShardReader(directory), planner=_Planner())
    except CheckpointException as error:  # It contains what each rank has raised.
        raise next((cause for cause, _ in error.failures.values() if isinstance(cause, DataError)), error) from error


class ShardReader(FileSystemReader):
    """Reads the index of a checkpoint directory with the few classes that PyTorch writes, and no other."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path, INDEX)
        try:
            with open(path, "rb") as file:
                metadata: Any = _Unpickler(file).load()
            outside = [info.relative_path for info in metadata.storage_data.values() if not _is_plain(info)]
        except Exception as error:  # An incomplete or foreign file raises one of many types.
            raise DataError(
                f"{path}: not a valid index of a checkpoint directory ({error}). Nothing in it was run.", _REPLACE
            ) from error
        if outside:
            raise DataError(f"{path}: the index refers to a file outside of the directory: {outside[0]!r}.", _REPLACE)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata  # type: ignore[no-any-return]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # of Python 3.13
            module = "pathlib"
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Loads non-tensor values with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            content = torch.load(value, weights_only=True)
        except Exception as error:
            raise DataError(
                f"{read_item.dest_index.fqn}: the value in the checkpoint is not plain data. Nothing in it was run.",
                _REPLACE,
            ) from error
        plain = io.BytesIO()
        torch.save(content, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)  # PyTorch unpickles what has been written here.


def _is_plain(info: Any) -> bool:
    """Return whether the index entry names a file of the directory itself."""
    name = info.relative_path
    return isinstance(name, str) and Path(name).name == name and name != ".." and "\\" not in name
