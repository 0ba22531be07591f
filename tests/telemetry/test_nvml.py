"""The sampler against a made-up NVML: every error code, two GPUs, MIG, a card that fails."""

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
CODES = sorted(
    value
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_") and isinstance(value, int)
)
QUERIES = {
    "nvmlDeviceGetPowerUsage": "power_watts",
    "nvmlDeviceGetUtilizationRates": "gpu_utilisation_percent",
    "nvmlDeviceGetTemperature": "temperature_celsius",
    "nvmlDeviceGetMemoryInfo": "memory_used_bytes",
    "nvmlDeviceGetClockInfo": "sm_clock_mhz",
    "nvmlDeviceGetEnforcedPowerLimit": "power_limit_watts",
}


class Fake:
    """NVML with two cards; every answer may be changed, and every call is counted."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self) -> None:
        self.handles = {f"GPU-{UUID}": "second", "GPU-other": "first"}
        self.addresses = {"00000000:1B:00.0": "second"}
        self.calls: dict[str, int] = {}
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: self._known(self.handles, uuid),
            "nvmlDeviceGetHandleByPciBusId": lambda bus: self._known(self.addresses, bus),
            "nvmlDeviceGetMigMode": lambda gpu: self.fail(3),
            "nvmlDeviceGetPowerUsage": lambda gpu: {"second": 250_000, "first": 90_000}[gpu],
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: 5_000_000,
            "nvmlDeviceGetUtilizationRates": lambda gpu: types.SimpleNamespace(gpu=97, memory=41),
            "nvmlDeviceGetClockInfo": lambda gpu, clock: {1: 1980, 2: 3201}[clock],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
            "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(used=7 * 2**30),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x4 | 0x200,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x20,
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
        }

    def fail(self, code: int) -> Any:
        raise pynvml.NVMLError(code)

    def _known(self, handles: dict[str, str], name: str) -> str:
        return handles.get(name) or self.fail(pynvml.NVML_ERROR_NOT_FOUND)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.answers:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return self.answers[name](*arguments)

        return call


@pytest.fixture
def fake(monkeypatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid=UUID, pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 10.0

    monkeypatch.setattr(nvml_module.time, "monotonic", lambda: Clock.now)
    return Clock


def still() -> Nvml:
    """A meter whose thread takes no sample of its own during a test."""
    return Nvml(CUDA, period=1000.0)


def only(value: float) -> dict[str, float]:
    return {"mean": value, "min": value, "max": value}


def test_all_fields(fake: Fake) -> None:
    joules = iter([5_000_000, 5_120_500])
    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: next(joules)
    with still() as meter:
        pass
    assert meter.read() == {
        "power_watts": only(250),
        "gpu_utilisation_percent": only(97),
        "memory_utilisation_percent": only(41),
        "sm_clock_mhz": only(1980),
        "memory_clock_mhz": only(3201),
        "temperature_celsius": only(61),
        "memory_used_bytes": only(7 * 2**30),
        "throttle_share": {"sw_power_cap": 1.0, "0x200": 1.0},
        "joules": 120.5,
        "joules_from": "counter",
        "power_limit_watts": 700,
        "samples": 1,
        "missed": {},
        "absent": {},
    }
    assert fake.calls["nvmlInit"] == fake.calls["nvmlShutdown"] == 1
    assert meter.joules() == 120.5  # and after the end, too


def test_mean_min_and_max(fake: Fake) -> None:
    fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: next(watts)
    watts_of_four = [100_000, 400_000, 250_000, 250_000]
    watts = iter(watts_of_four)
    reasons = iter([0, 4, None, 0x40])

    def read_reasons(gpu: str) -> int:
        now = next(reasons)
        return fake.fail(3) if now is None else now

    fake.answers["nvmlDeviceGetCurrentClocksEventReasons"] = read_reasons
    fake.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = lambda gpu: fake.fail(3)
    with still() as meter:
        for _ in range(3):
            meter._sample()
        read = meter.read()
    assert read["power_watts"] == {"mean": 250, "min": 100, "max": 400}
    third = pytest.approx(1 / 3)  # of the samples that could be had
    assert read["throttle_share"] == {"sw_power_cap": third, "hw_thermal": third}
    assert read["missed"] == {"throttle_share": 1}
    assert read["samples"] == 4


def test_power_is_integrated_where_there_is_no_counter(fake: Fake, clock) -> None:
    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: fake.fail(3)
    watts = [100_000]
    fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: watts[0]
    with still() as meter:
        assert meter.joules() == 0
        clock.now, watts[0] = 12.0, 300_000
        assert meter.joules() == 400  # 2 s at 200 W on average
        clock.now = 13.0
        assert meter.joules() == 700
        fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: fake.fail(15)
        clock.now = 14.0
        assert meter.joules() == 700
        fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: 100_000
        clock.now = 15.0
        read = meter.read()
    assert read["joules"] == 700 + 2 * 200  # over the gap, too
    assert read["joules_from"] == "power"
    assert read["missed"] == {"power_watts": 1}
    assert read["absent"] == {"energy_counter": "Not Supported"}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_refused_is_absent_with_its_reason(
    fake: Fake, query: str, code: int
) -> None:
    fake.answers[query] = lambda *arguments: fake.fail(code)
    with still() as meter:
        pass
    read, field = meter.read(), QUERIES[query]
    assert field not in read
    assert read["absent"][field] == " ".join(str(pynvml.NVMLError(code)).split())
    assert set(QUERIES.values()) - {field} <= read.keys()
    assert read["joules"] == 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("query", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
def test_no_nvml_at_all(fake: Fake, query: str, code: int) -> None:
    fake.handles.clear()
    fake.answers[query] = lambda *arguments: fake.fail(code)
    with still() as meter:
        assert meter.joules() is None
    why = " ".join(str(pynvml.NVMLError(code)).split())
    assert meter.read() == {"samples": 0, "missed": {}, "absent": {"all": why}}


@pytest.mark.parametrize("code", CODES)
def test_nothing_is_answered(fake: Fake, code: int) -> None:
    for name in fake.answers:
        if "Handle" not in name and name != "nvmlInit":
            fake.answers[name] = lambda *arguments: fake.fail(code)
    with still() as meter:
        assert meter.joules() is None
    read = meter.read()
    why = " ".join(str(pynvml.NVMLError(code)).split())
    assert read.keys() == {"samples", "missed", "absent"}
    assert set(read["absent"].values()) == {why}
    assert {"power_watts", "joules", "throttle_share", *QUERIES.values()} <= read["absent"].keys()


def test_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with still() as meter:
        pass
    assert "pynvml" in meter.read()["absent"]["all"]


def test_bindings_without_a_function(fake: Fake) -> None:
    del fake.answers["nvmlDeviceGetTemperature"]
    del fake.answers["nvmlDeviceGetCurrentClocksEventReasons"]  # older: ThrottleReasons
    with still() as meter:
        pass
    read = meter.read()
    assert read["absent"] == {"temperature_celsius": "nvmlDeviceGetTemperature"}
    assert read["throttle_share"] == {"sw_thermal": 1.0}


def test_a_driver_without_the_new_function(fake: Fake) -> None:
    fake.answers["nvmlDeviceGetCurrentClocksEventReasons"] = lambda gpu: fake.fail(
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    )
    with still() as meter:
        pass
    assert meter.read()["throttle_share"] == {"sw_thermal": 1.0}


def test_the_card_is_found_by_its_address(fake: Fake) -> None:
    fake.handles.clear()
    with still() as meter:
        pass
    assert meter.read()["power_watts"] == only(250)


def test_a_mig_instance_is_sampled_as_one(fake: Fake) -> None:
    fake.handles = {f"MIG-{UUID}": "second", f"GPU-{UUID}": "first"}
    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: fake.fail(3)
    fake.answers["nvmlDeviceGetPowerUsage"] = lambda gpu: fake.fail(3)
    with still() as meter:
        assert meter.joules() is None
    read = meter.read()
    assert read["memory_used_bytes"] == only(7 * 2**30)
    assert read["absent"] == dict.fromkeys(
        ("power_watts", "energy_counter", "joules"), "Not Supported"
    )


@pytest.mark.parametrize("by_uuid", [True, False])
def test_a_split_card_is_not_taken_for_its_instance(fake: Fake, by_uuid: bool) -> None:
    if not by_uuid:
        fake.handles.clear()
    fake.answers["nvmlDeviceGetMigMode"] = lambda gpu: [1, 0]
    with still() as meter:
        pass
    assert "split by MIG" in meter.read()["absent"]["all"]
    assert meter.joules() is None


def test_a_card_whose_counter_goes_back(fake: Fake) -> None:
    joules = iter([5_000_000, 10])
    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: next(joules)
    with still() as meter:
        assert meter.joules() is None
        fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda gpu: 10
        read = meter.read()
    assert read["absent"]["joules"] == "the card's energy counter went back"


def test_a_card_that_is_lost_midway(fake: Fake) -> None:
    with still() as meter:
        for name in list(fake.answers):
            fake.answers[name] = lambda *arguments: fake.fail(pynvml.NVML_ERROR_GPU_IS_LOST)
        meter._sample()
        assert meter.joules() is None
    read = meter.read()
    assert read["power_watts"] == only(250)  # of before
    assert read["samples"] == 2
    assert read["missed"]["power_watts"] == 1
    assert read["absent"]["joules"] == "GPU is lost"


def test_a_thread_samples_and_ends(fake: Fake) -> None:
    enough = threading.Event()
    seen: set[str] = set()

    def power(gpu: str) -> int:
        seen.add(threading.current_thread().name)
        if fake.calls["nvmlDeviceGetPowerUsage"] >= 5:
            enough.set()
        return 1000

    fake.answers["nvmlDeviceGetPowerUsage"] = power
    with Nvml(CUDA, period=0.001) as meter:
        assert enough.wait(10)
    assert seen == {"nvml", "MainThread"}
    assert not any(thread.name == "nvml" for thread in threading.enumerate())
    assert meter.read()["samples"] >= 5


def test_a_driver_that_hangs_does_not_hold_the_run(fake: Fake, monkeypatch) -> None:
    release = threading.Event()
    began = threading.Event()

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
    assert "nvmlShutdown" not in fake.calls  # under a query that is still out


def test_a_cpu_and_telemetry_off(fake: Fake) -> None:
    with Nvml(torch.device("cpu")) as meter:
        assert meter.joules() is None
    assert meter.read() == {
        "samples": 0,
        "missed": {},
        "absent": {"all": "the device is no GPU"},
    }
    with Nvml(CUDA, enabled=False) as meter:
        pass
    assert meter.read()["absent"] == {"all": "telemetry is off"}
    assert fake.calls == {}


def test_facts_of_the_card(fake: Fake) -> None:
    assert nvml_module.card(CUDA) == {"driver": "580.65", "power_limit_watts": 700}
    assert fake.calls["nvmlInit"] == fake.calls["nvmlShutdown"] == 1
    fake.answers["nvmlDeviceGetEnforcedPowerLimit"] = lambda gpu: fake.fail(4)
    assert nvml_module.card(CUDA) == {"driver": "580.65", "power_limit_watts": None}
    assert fake.calls["nvmlShutdown"] == 2
    fake.answers["nvmlInit"] = lambda: fake.fail(9)
    assert nvml_module.card(CUDA) == {"driver": None, "power_limit_watts": None}


@pytest.mark.gpu
def test_a_real_card() -> None:
    with Nvml(torch.device("cuda", 0), period=0.02) as meter:
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        for _ in range(200):
            torch.mm(a, a)
        torch.cuda.synchronize()
    read = meter.read()
    assert read["samples"] >= 1
    for field in (*QUERIES.values(), "joules"):
        assert field in read or read["absent"][field]
