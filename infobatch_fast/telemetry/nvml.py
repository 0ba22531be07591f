"""Power, energy, utilisation, clock, temperature and memory of a GPU, sampled while it works.

NVML may be missing, refuse a query, or know the whole card where a MIG instance is meant: every
figure that cannot be had is left out and its reason given instead. Nothing here raises.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch

from infobatch_fast.errors import reason

PERIOD = 0.1  # s; the driver renews its readings about as often
PATIENCE = 2.0  # s that a query may take at the end

_SAMPLED: dict[str, Callable[[Any, Any], float]] = {
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "gpu_utilisation_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(
        gpu, nvml.NVML_TEMPERATURE_GPU
    ),
    "memory_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
}


class Nvml:
    """A thread that samples one GPU in a `with`, each `period` s; of a CPU it has no figures."""

    def __init__(
        self, device: torch.device, *, enabled: bool = True, period: float = PERIOD
    ) -> None:
        self._device, self._enabled, self._period = device, enabled, period
        self._nvml: Any = None
        self._gpu: Any = None
        self._absent: dict[str, str] = {}
        self._values: dict[str, tuple[int, float, float, float]] = {}  # count, sum, min, max
        self._start: float | None = None  # J, on the card's counter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._final: dict[str, Any] | None = None

    def __enter__(self) -> "Nvml":
        if not self._enabled or self._device.type != "cuda":
            self._absent["all"] = "the device is no GPU" if self._enabled else "telemetry is off"
            return self
        try:
            self._nvml = _initialised()
            self._gpu = _find(self._nvml, self._device)
        except Exception as error:  # not installed, no driver, no permission
            self._absent["all"] = reason(error)
            return self
        self._start = self._ask("joules", self._counter)
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
            if self._thread.is_alive():  # a driver that hangs must not hold the run
                self._gpu = self._start = None
                self._absent["all"] = "the driver does not answer"
        self._final = self.read()

    def joules(self) -> float | None:
        """J since the start, by the card's counter; None if it has none, as before Volta."""
        if self._final is not None:
            return self._final.get("joules")
        if self._start is None:
            return None
        now = self._ask("joules", self._counter)
        return None if now is None else now - self._start

    def read(self) -> dict[str, Any]:
        """Mean, min and max by field, "joules", and under "absent" why a field is not there."""
        if self._final is not None:
            return self._final
        fields: dict[str, Any] = {
            name: {"mean": total / count, "min": low, "max": high}
            for name, (count, total, low, high) in self._values.copy().items()
        }
        joules = self.joules()
        if joules is not None:
            fields["joules"] = joules
        absent = {name: why for name, why in self._absent.items() if name not in fields}
        return {**fields, "absent": absent}

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._sample()

    def _sample(self) -> None:
        for name, query in _SAMPLED.items():
            value = self._ask(name, lambda query=query: query(self._nvml, self._gpu))
            if value is not None:
                count, total, low, high = self._values.get(name, (0, 0.0, value, value))
                low, high = min(low, value), max(high, value)
                self._values[name] = count + 1, total + value, low, high

    def _counter(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1000

    def _ask(self, name: str, query: Callable[[], float]) -> float | None:
        try:
            return query()
        except Exception as error:  # NVML's every code, and bindings without the function
            self._absent[name] = reason(error)
            return None


def card(device: torch.device) -> dict[str, Any]:
    """Driver and power limit (W) of a CUDA device, for a record; None where NVML does not say."""
    facts: dict[str, Any] = {"driver": None, "power_limit_watts": None}
    with suppress(Exception):
        nvml = _initialised()
        facts["driver"] = nvml.nvmlSystemGetDriverVersion()
        gpu = _find(nvml, device)
        facts["power_limit_watts"] = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000
    return facts


def _initialised() -> Any:
    nvml: Any = import_module("pynvml")
    nvml.nvmlInit()  # it may be called again, and the process's end is soon enough to end it
    return nvml


def _find(nvml: Any, device: torch.device) -> Any:
    """The handle of torch's device, which CUDA_VISIBLE_DEVICES may have numbered anew."""
    properties: Any = torch.cuda.get_device_properties(device)
    with suppress(Exception):  # most devices are none
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{properties.uuid}")
    try:
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except Exception:  # inside some containers it has another name
        gpu = nvml.nvmlDeviceGetHandleByPciBusId(
            f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}"
            f":{properties.pci_device_id:02X}.0"
        )
    split = False
    with suppress(Exception):  # a card that cannot be split
        split = nvml.nvmlDeviceGetMigMode(gpu)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    if split:
        raise RuntimeError("the card is split by MIG, and this instance's figures are unknown")
    return gpu
