"""Where the host waits for the device: counted or forbidden."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MODES = {"off": "default", "count": "warn", "forbid": "error"}  # of torch's sync debug mode


class HostSync(RuntimeError):
    """The host waited for the device where that was forbidden."""


class HostSyncs:
    """What `host_syncs` saw: in `places` as "file.py:line" on a GPU, by operation on a CPU."""

    def __init__(self, cuda: bool, mode: str) -> None:
        self.places: Counter[str] = Counter()
        self._cuda, self._mode = cuda, mode
        self._watching = True

    @property
    def count(self) -> int:
        """Host syncs so far."""
        return self.places.total()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A `with` in which the host may wait uncounted: to save a checkpoint, say."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, watching: bool) -> None:
        self._watching = watching
        if self._cuda:
            torch.cuda.set_sync_debug_mode(self._mode if watching else "default")

    def _seen(self, place: str) -> None:
        if self._watching:
            self.places[place] += 1
            if self._mode == "error":
                raise HostSync(f"a host sync where none is allowed, by {place}")


@contextmanager
def host_syncs(device: torch.device, action: str) -> Iterator[HostSyncs]:
    """Watch where the host waits for the device.

    On a GPU it is torch's sync debug mode, which knows torch's own operations alone. On a CPU
    nothing waits, and what is watched are the reads of a tensor's value, each of which would be a
    host sync on a GPU: those that are operations of torch, such as item() and nonzero(), but not
    tolist() and numpy().

    Args:
        action: count; forbid: raise HostSync at the first; or off: see nothing.
    """
    cuda = device.type == "cuda" and action != "off"
    watch = HostSyncs(cuda, _MODES[action])
    if action == "off":
        yield watch
        return
    if not cuda:
        with _HostReads(watch):
            yield watch
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # "is a prototype"
        warnings.filterwarnings("always", _SYNCHRONIZING)
        show = warnings.showwarning

        def count(message: Any, category: Any, file: str, line: int, *rest: Any) -> None:
            if _SYNCHRONIZING in str(message):
                watch._seen(f"{Path(file).name}:{line}")
            else:
                show(message, category, file, line, *rest)

        warnings.showwarning = count
        watch._switch(True)
        try:
            yield watch
        except RuntimeError as error:
            if _SYNCHRONIZING not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
            raise HostSync(f"a host sync where none is allowed, at {where}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


_SYNCHRONIZING = "called a synchronizing CUDA operation"  # of torch's debug mode


class _HostReads(TorchDispatchMode):
    def __init__(self, watch: HostSyncs) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or (func in _INDEXED and _by_mask(args[1])):
            self._watch._seen(str(func).removeprefix("aten.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
# item(), bool(), int(); and sizes that depend on values
_READS = {
    *(_aten._local_scalar_dense.default, _aten.equal.default, _aten.allclose.default),
    *(_aten.nonzero.default, _aten.masked_select.default, _aten.bincount.default),
    *(_aten._unique2.default, _aten.unique_dim.default, _aten.unique_consecutive.default),
    _aten.repeat_interleave.Tensor,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default}


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype is torch.bool for index in indices)
