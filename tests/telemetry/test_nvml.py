"""The sampler against a made-up NVML: refused queries, two GPUs, MIG, a card that fails."""

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pynvml
import pytest
import torch

from infobatch_fast.telemetry import nvml as nvml_module
from infobatch_fast.telemetry.nvml import Nvml

CUDA = torch.device("cuda", 0)
UUID = "12345678-1234-1234-1234-123456789abc"
NOT_FOUND, LOST = pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_GPU_IS_LOST
FIELDS = {  # by the query that they are from, in the units of the record
    "nvmlDeviceGetPowerUsage": ("power_watts", 250),
    "nvmlDeviceGetUtilizationRates": ("gpu_utilisation_percent", 97),
    "nvmlDeviceGetClockInfo": ("sm_clock_mhz", 1980),
    "nvmlDeviceGetTemperature": ("temperature_celsius", 61),
    "nvmlDeviceGetMemoryInfo": ("memory_used_bytes", 7 * 2**30),
}


def fail(code: int) -> Any:
    raise pynvml.NVMLError(code)


class Fake:
    """NVML with two cards, of which ours is the second; every answer may be changed."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_DEVICE_MIG_ENABLE = 1, 0, 1

    def __init__(self) -> None:
        self.handles = {f"GPU-{UUID}": "second", "GPU-other": "first", "00000000:1B:00.0": "second"}
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlDeviceGetHandleByUUID": self._known,
            "nvmlDeviceGetHandleByPciBusId": self._known,
            "nvmlDeviceGetMigMode": lambda gpu: fail(pynvml.NVML_ERROR_NOT_SUPPORTED),
            "nvmlDeviceGetPowerUsage": lambda gpu: {"second": 250_000, "first": 90_000}[gpu],
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: 5_000_000,
            "nvmlDeviceGetUtilizationRates": lambda gpu: types.SimpleNamespace(gpu=97),
            "nvmlDeviceGetClockInfo": lambda gpu, clock: {1: 1980, 2: 3201}[clock],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
            "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(used=7 * 2**30),
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
        }

    def _known(self, name: str) -> str:
        return self.handles.get(name) or fail(NOT_FOUND)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.answers[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid=UUID, pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def still() -> Nvml:
    """A meter whose thread takes no sample of its own during a test."""
    return Nvml(CUDA, period=1000.0)


def test_all_fields(fake: Fake) -> None:
    joules = iter([5_000_000, 5_060_000, 5_120_500])
    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: next(joules)
    with still() as meter:
        assert meter.joules() == 60
        fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: 100_000
        meter._sample()
    expected = {n: {"mean": v, "min": v, "max": v} for n, v in FIELDS.values()}
    expected["power_watts"] = {"mean": 175, "min": 100, "max": 250}
    assert meter.read() == {**expected, "joules": 120.5, "absent": {}}
    assert meter.joules() == 120.5  # and after the end, too


@pytest.mark.parametrize("query", [*FIELDS, "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_query_that_is_refused_is_absent_with_its_reason(fake: Fake, query: str) -> None:
    fake.answers[query] = lambda *arguments: fail(pynvml.NVML_ERROR_NOT_SUPPORTED)
    with still() as meter:
        pass
    every, field = {name for name, _ in FIELDS.values()}, FIELDS.get(query, ("joules",))[0]
    assert meter.read()["absent"] == {field: "Not Supported"}
    assert meter.read().keys() == (every | {"joules", "absent"}) - {field}


@pytest.mark.parametrize("query", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
def test_no_nvml_at_all(fake: Fake, query: str) -> None:
    fake.handles.clear()
    fake.answers[query] = lambda *arguments: fail(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with still() as meter:
        assert meter.joules() is None
    assert meter.read() == {"absent": {"all": "Driver Not Loaded"}}


def test_not_installed_or_without_a_function(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    del fake.answers["nvmlDeviceGetTemperature"]
    with still() as meter:
        pass
    assert meter.read()["absent"] == {"temperature_celsius": "nvmlDeviceGetTemperature"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with still() as meter:
        pass
    assert "pynvml" in meter.read()["absent"]["all"]


@pytest.mark.parametrize("named", [f"GPU-{UUID}", f"MIG-{UUID}", "00000000:1B:00.0"])
def test_the_card_is_found_by_each_of_its_names(fake: Fake, named: str) -> None:
    fake.handles = {named: "second", "GPU-other": "first"}
    with still() as meter:
        pass
    assert meter.read()["power_watts"]["mean"] == 250


def test_a_split_card_is_not_taken_for_its_instance(fake: Fake) -> None:
    fake.answers["nvmlDeviceGetMigMode"] = lambda gpu: [1, 0]
    with still() as meter:
        pass
    assert "split by MIG" in meter.read()["absent"]["all"]
    assert meter.joules() is None


def test_a_card_that_is_lost_midway(fake: Fake) -> None:
    with still() as meter:
        for name in fake.answers:
            fake.answers[name] = lambda *arguments: fail(LOST)
        meter._sample()
        assert meter.joules() is None
    assert meter.read()["power_watts"]["mean"] == 250  # of before
    assert meter.read()["absent"] == {"joules": "GPU is lost"}


def test_a_thread_samples_and_ends(fake: Fake) -> None:
    enough = threading.Event()
    seen: list[str] = []

    def power(gpu: str) -> int:
        seen.append(threading.current_thread().name)
        if len(seen) >= 5:
            enough.set()
        return 1000

    fake.answers["nvmlDeviceGetPowerUsage"] = power
    with Nvml(CUDA, period=0.001):
        assert enough.wait(10)
    assert set(seen[1:]) == {"nvml"}
    assert not any(thread.name == "nvml" for thread in threading.enumerate())


def test_a_driver_that_hangs_does_not_hold_the_run(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, began = threading.Event(), threading.Event()

    def power(gpu: str) -> int:
        if threading.current_thread().name == "nvml":
            began.set()
            release.wait(30)
        return 1000

    fake.answers["nvmlDeviceGetPowerUsage"] = power
    monkeypatch.setattr(nvml_module, "PATIENCE", 0.05)
    with Nvml(CUDA, period=0.001) as meter:
        assert began.wait(10)
    read = meter.read()
    release.set()
    assert read["absent"]["all"] == "the driver does not answer"
    assert meter.joules() is None


def test_a_cpu_and_telemetry_off(fake: Fake) -> None:
    fake.answers.clear()
    with Nvml(torch.device("cpu")) as of_cpu, Nvml(CUDA, enabled=False) as off:
        assert of_cpu.joules() is off.joules() is None
    assert of_cpu.read() == {"absent": {"all": "the device is no GPU"}}
    assert off.read() == {"absent": {"all": "telemetry is off"}}


def test_facts_of_the_card(fake: Fake) -> None:
    assert nvml_module.card(CUDA) == {"driver": "580.65", "power_limit_watts": 700}
    fake.answers["nvmlDeviceGetEnforcedPowerLimit"] = lambda gpu: fail(NOT_FOUND)
    assert nvml_module.card(CUDA) == {"driver": "580.65", "power_limit_watts": None}
    fake.answers["nvmlInit"] = lambda: fail(LOST)
    assert nvml_module.card(CUDA) == {"driver": None, "power_limit_watts": None}


@pytest.mark.gpu
def test_a_real_card() -> None:
    with Nvml(torch.device("cuda", 0), period=0.02) as meter:
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        for _ in range(200):
            torch.mm(a, a)
        torch.cuda.synchronize()
    read = meter.read()
    for name, _ in FIELDS.values():
        assert name in read["absent"] or read[name]["min"] <= read[name]["max"]
    assert "joules" in read["absent"] or read["joules"] > 0
