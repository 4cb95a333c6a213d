"""How regions are timed on a GPU, against a stand-in for torch.cuda that keeps a device clock."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from perf import timing

GPU = torch.device("cuda")


class Device:
    """A device clock in seconds, a log of what was issued, and the parts of torch.cuda in use."""

    def __init__(self, can_capture=True):
        self.now = 0.0
        self.log = []
        self.capturing = None
        self.can_capture = can_capture
        self.memory = 100

    def region(self, seconds, on_the_host=0.0):
        def run():
            time.sleep(on_the_host)
            if self.capturing is not None:
                if not self.can_capture:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                self.capturing.append(seconds)
                return
            self.log.append("region")
            self.now += seconds

        return run

    def flush(self, device):
        self.log.append("flush")
        self.now += 1.0

    def as_module(self):
        owner = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                owner.log.append("event")
                self.at = owner.now

            def synchronize(self): ...

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self):
                self.parts = []

            def replay(self):
                owner.log.append("replay")
                owner.now += sum(self.parts)

        @contextmanager
        def graph(captured, stream):
            owner.capturing = captured.parts
            try:
                yield
            finally:
                owner.capturing = None

        return SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=graph,
            Stream=lambda device: "stream",
            synchronize=lambda device=None: None,
            memory_allocated=lambda device: owner.memory,
            reset_peak_memory_stats=lambda device: None,
            max_memory_allocated=lambda device: owner.memory + 4096,
        )


@pytest.fixture
def prepared(monkeypatch):
    def prepare(seconds, can_capture=True, on_the_host=0.0):
        device = Device(can_capture)
        monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=device.as_module()))
        monkeypatch.setattr(timing, "_flush", device.flush)
        timing._stream.cache_clear()
        found = timing.prepare(device.region(seconds, on_the_host), GPU)
        device.log.clear()
        return device, found

    yield prepare
    timing._stream.cache_clear()


def test_a_long_region_is_run_between_events_after_a_flush(prepared):
    device, found = prepared(1e-3)
    assert found.sample() == pytest.approx(1e-3)
    assert device.log == ["flush", "event", "region", "event"]
    assert "graph" not in found.facts


def test_a_short_region_is_replayed_from_a_graph(prepared):
    device, found = prepared(20e-6)
    assert found.sample() == pytest.approx(20e-6)
    assert device.log == ["flush", "event", "replay", "event"]
    assert found.facts["graph"] == "yes"


def test_a_region_that_the_host_issues_more_slowly_than_the_device_works_is_replayed(prepared):
    device, found = prepared(2e-3, on_the_host=4e-3)
    assert found.sample() == pytest.approx(2e-3)
    assert device.log == ["flush", "event", "replay", "event"]
    assert found.facts["host_us"] >= 4000


def test_a_region_that_cannot_be_captured_is_run_and_the_reason_is_kept(prepared):
    device, found = prepared(20e-6, can_capture=False)
    assert found.sample() == pytest.approx(20e-6)
    assert device.log == ["flush", "event", "region", "event"]
    assert found.facts["graph"] == "no: operation not permitted when stream is capturing"


def test_memory_host_time_and_end_to_end_time_are_told_apart(prepared):
    _, found = prepared(1e-3)
    assert found.facts["peak_memory_bytes"] == 4096
    assert 0 < found.facts["host_us"] <= found.facts["end_to_end_us"]
