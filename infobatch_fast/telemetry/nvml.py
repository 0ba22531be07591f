"""Power, energy, utilisation, clocks, temperature and memory of a GPU, sampled while it works.

NVML may be missing, refuse a query, or know the whole card where a MIG instance is meant: every
figure that cannot be had is left out and its reason given instead. Nothing here raises.
"""

import threading
import time
from collections import Counter
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
    "memory_utilisation_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory,
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(
        gpu, nvml.NVML_TEMPERATURE_GPU
    ),
    "memory_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
}

_THROTTLE = {  # nvml.h, nvmlClocksEventReason*
    0x1: "gpu_idle",
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}


class Nvml:
    """A thread that samples one GPU in a `with`, without a word to the device's own queue.

    Args:
        device: sampled if it is a CUDA device; a CPU has no figures, for that reason.
        enabled: False samples nothing, and says so.
        period: s between samples.
    """

    def __init__(
        self, device: torch.device, *, enabled: bool = True, period: float = PERIOD
    ) -> None:
        self._device, self._enabled, self._period = device, enabled, period
        self._nvml: Any = None
        self._gpu: Any = None
        self._absent: dict[str, str] = {}
        self._missed: Counter[str] = Counter()
        self._values: dict[str, tuple[int, float, float, float]] = {}  # count, sum, min, max
        self._throttled: Counter[str] = Counter()
        self._throttle_samples = 0
        self._samples = 0
        self._counter: float | None = None  # J, at the start
        self._power: tuple[float, float] | None = None  # s and W of the last sample
        self._integral = 0.0  # J
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._final: dict[str, Any] | None = None

    def __enter__(self) -> "Nvml":
        if not self._enabled or self._device.type != "cuda":
            self._absent["all"] = "the device is no GPU" if self._enabled else "telemetry is off"
            return self
        try:
            self._nvml = import_module("pynvml")
            self._nvml.nvmlInit()
        except Exception as error:  # not installed, no driver, no permission
            self._absent["all"], self._nvml = reason(error), None
            return self
        try:
            self._gpu = _find(self._nvml, self._device)
        except Exception as error:
            self._absent["all"] = reason(error)
            return self
        self._counter = self._ask("energy_counter", self._read_counter)
        self._sample()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():  # a driver that hangs must not hold the run
                self._gpu, self._absent["all"] = None, "the driver does not answer"
                self._final = self.read()
                return
        self._final = self.read()
        if self._nvml is not None:
            with suppress(Exception):
                self._nvml.nvmlShutdown()

    def joules(self) -> float | None:
        """J since the start: the card's counter, or the power integrated; None if unknown."""
        if self._final is not None:
            return self._final.get("joules")
        if self._gpu is None:
            return None
        if self._counter is not None:
            return self._ask("joules", self._counted)
        self._sample()
        with self._lock:
            return None if self._power is None else self._integral

    def read(self) -> dict[str, Any]:
        """Mean, min and max by field, and under "absent" why a field is not there.

        Beside the sampled fields: "joules" since the start and "joules_from" (counter, or power
        integrated over time); "throttle_share", the share of samples by reason; "samples";
        "power_limit_watts"; and "missed", how many samples of a field failed.
        """
        if self._final is not None:
            return self._final
        joules = self.joules()
        limit = None
        if self._gpu is not None:
            limit = self._ask(
                "power_limit_watts",
                lambda: self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._gpu) / 1000,
            )
        with self._lock:
            fields: dict[str, Any] = {
                name: {"mean": total / count, "min": low, "max": high}
                for name, (count, total, low, high) in self._values.items()
            }
            if self._throttle_samples:
                fields["throttle_share"] = {
                    name: count / self._throttle_samples
                    for name, count in sorted(self._throttled.items())
                }
            if joules is not None:
                fields["joules"] = joules
                fields["joules_from"] = "power" if self._counter is None else "counter"
            if limit is not None:
                fields["power_limit_watts"] = limit
            missed = {name: count for name, count in self._missed.items() if name in fields}
            absent = {name: why for name, why in self._absent.items() if name not in fields}
            if joules is None and "power_watts" in absent:
                absent.setdefault("joules", absent["power_watts"])
            return {**fields, "samples": self._samples, "missed": missed, "absent": absent}

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._sample()

    def _sample(self) -> None:
        values = {
            name: self._ask(name, lambda query=query: query(self._nvml, self._gpu))
            for name, query in _SAMPLED.items()
        }
        reasons = self._ask("throttle_share", self._read_throttle)
        now, watts = time.monotonic(), values["power_watts"]
        with self._lock:
            self._samples += 1
            for name, value in values.items():
                if value is not None:
                    count, total, low, high = self._values.get(name, (0, 0.0, value, value))
                    low, high = min(low, value), max(high, value)
                    self._values[name] = count + 1, total + value, low, high
            self._throttle_samples += reasons is not None
            for place in range(int(reasons or 0).bit_length()):
                if int(reasons or 0) >> place & 1:
                    self._throttled[_THROTTLE.get(1 << place, hex(1 << place))] += 1
            if watts is not None:
                if self._power is not None and now > self._power[0]:
                    then, before = self._power
                    self._integral += (now - then) * (watts + before) / 2
                    self._power = now, watts
                self._power = self._power or (now, watts)

    def _counted(self) -> float:
        assert self._counter is not None
        joules = self._read_counter() - self._counter
        if joules < 0:
            raise RuntimeError("the card's energy counter went back")
        return joules

    def _read_counter(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1000

    def _read_throttle(self) -> int:
        try:
            return self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._gpu)
        except Exception:  # its name before driver 535
            return self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)

    def _ask(self, name: str, query: Callable[[], float | None]) -> float | None:
        try:
            return query()
        except Exception as error:  # NVML's every code, and bindings without the function
            with self._lock:
                self._missed[name] += 1
                self._absent[name] = reason(error)
            return None


def card(device: torch.device) -> dict[str, Any]:
    """Driver and power limit (W) of a CUDA device, for a record; None where NVML does not say."""
    facts: dict[str, Any] = {"driver": None, "power_limit_watts": None}
    with suppress(Exception):
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        try:
            facts["driver"] = nvml.nvmlSystemGetDriverVersion()
            gpu = _find(nvml, device)
            facts["power_limit_watts"] = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000
        finally:
            nvml.nvmlShutdown()
    return facts


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
