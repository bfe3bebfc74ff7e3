"""ElasticSession on real files: threads, background loading, broken files, memory, clocks and counters."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_prune import runtime
from lightning_prune.runtime import ElasticError, ElasticSession, Policy, Variant

X = np.ones((1, 4), np.float32)


def write_model(path, factor, width=4, name="y", padding=0):
    """A file that multiplies by a number, so that an output says which variant made it."""
    constant = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    weights = [constant, numpy_helper.from_array(np.zeros(padding, np.float32), "padding")]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], [name])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


@pytest.fixture
def family(tmp_path):
    entries = []
    for factor, (name, cost) in enumerate([("large", 8.0), ("medium", 4.0), ("small", 2.0)], 1):
        write_model(tmp_path / f"{name}.onnx", factor)
        total = hashlib.sha256((tmp_path / f"{name}.onnx").read_bytes()).hexdigest()
        entries.append({"name": name, "file": f"{name}.onnx", "cost": cost, "sha256": total})
    (tmp_path / "elastic.json").write_text(json.dumps({"schema": 1, "variants": entries}))
    return tmp_path


class Clock:
    """Time that passes only when a model runs: as many milliseconds as its cost, times a load."""

    def __init__(self, load=1.0):
        self.now, self.load = 0.0, load
        self.opened: list[str] = []

    def __call__(self):
        return self.now

    def open(self, path):
        self.opened.append(path.stem)
        inner, cost, clock = (
            onnxruntime.InferenceSession(str(path)),
            {"large": 8, "medium": 4}.get(path.stem, 2),
            self,
        )

        class Timed:
            def run(self, *call):
                clock.now += cost * clock.load / 1000
                return inner.run(*call)

            def __getattr__(self, name):
                return getattr(inner, name)

        return Timed()


def served(session, runs=1):
    """Run, and say which variant made each output; wait for what loads meanwhile."""
    found = []
    for _ in range(runs):
        found.append(int(session.run(None, {"x": X})[0][0, 0]))
        loading = session._loading
        if loading is not None:
            loading.join()
    return found


def elastic(family, clock=None, **arguments):
    clock = clock or Clock()
    return ElasticSession(family, clock=clock, open_file=clock.open, **arguments), clock


def test_it_is_called_as_an_inference_session_is(family):
    with ElasticSession(family) as session:
        plain = onnxruntime.InferenceSession(str(family / "large.onnx"))
        assert np.array_equal(session.run(None, {"x": X})[0], plain.run(None, {"x": X})[0])
        assert np.array_equal(session.run(["y"], {"x": X}, onnxruntime.RunOptions())[0], X)
        for ends in ("get_inputs", "get_outputs"):
            (mine,), (theirs,) = getattr(session, ends)(), getattr(plain, ends)()
            assert (mine.name, mine.shape, mine.type) == (theirs.name, theirs.shape, theirs.type)
        assert session.get_modelmeta().graph_name == plain.get_modelmeta().graph_name
        assert session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(ElasticError, match="closed"):
        session.run(None, {"x": X})


def test_under_load_a_cheaper_variant_comes_and_goes_when_the_load_has_gone(family):
    policy = Policy(target_ms=11, dwell_s=0.1, window=5)
    session, clock = elastic(family, policy=policy)
    assert set(served(session, 50)) == {1}
    clock.load = 2.0  # large takes 16 ms, medium 8
    assert served(session, 50)[-1] == 2
    clock.load = 10.0  # even the small one misses
    assert served(session, 50)[-1] == 3
    clock.load = 1.0
    assert served(session, 200)[-1] == 1
    metrics = session.metrics()
    assert sum(metrics["runs_total"].values()) == 350
    assert metrics["switches_total"] == {"medium": 1, "small": 1, "large": 1}
    assert 0 < sum(metrics["deadline_misses_total"].values()) < 100


def test_the_signal_decides_with_and_without_a_target(family):
    session, _clock = elastic(family, policy=Policy(dwell_s=0.01))
    for signal, expected in ((None, 1), (1.0, 3), (0.5, 2), (lambda: 0.0, 1), (7.0, 3), (-1, 1)):
        session.signal = signal
        assert served(session, 30)[-1] == expected


def test_a_signal_that_fails_keeps_the_last_that_was_known(family):
    events = []
    session, _clock = elastic(family, policy=Policy(dwell_s=0.01), signal=1.0, log=events.append)
    assert served(session, 20)[-1] == 3

    def broken():
        raise OSError("no battery")

    for signal in (broken, float("nan"), "full"):
        session.signal = signal
        assert served(session, 20)[-1] == 3
    assert session.metrics()["signal_errors_total"][""] > 0
    assert "OSError: no battery" in [event.get("reason") for event in events]


@pytest.mark.parametrize(
    "how", ["changed", "truncated", "garbage", "missing", "other inputs", "other output"]
)
def test_a_broken_variant_is_left_out_and_counted(family, how):
    path = family / "medium.onnx"
    data = bytearray(path.read_bytes())
    if how == "changed":
        data[-20] ^= 0xFF  # still a model, with other weights
        path.write_bytes(data)
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(b"nothing")
    elif how == "missing":
        path.unlink()
    else:
        write_model(path, 2, **({"width": 5} if how == "other inputs" else {"name": "z"}))
        listed = json.loads((family / "elastic.json").read_text())
        listed["variants"][1]["sha256"] = ""
        (family / "elastic.json").write_text(json.dumps(listed))
    policy = Policy(target_ms=10, dwell_s=0.05, window=5)
    session, clock = elastic(family, policy=policy)
    clock.load = 2.0
    outputs = served(session, 60)
    assert outputs[0] == 1
    assert outputs[-1] == 3
    assert 2 not in outputs
    assert session.metrics()["load_failures_total"] == {"medium": 1}
    assert list(session.failures) == ["medium"]


def test_the_first_that_can_be_loaded_serves_and_none_is_an_error(family):
    (family / "large.onnx").write_bytes(b"nothing")
    session, _ = elastic(family)
    assert served(session) == [2]
    for name in ("medium", "small"):
        (family / f"{name}.onnx").unlink()
    with pytest.raises(ElasticError, match=r"no variant can be loaded.*medium.*small"):
        ElasticSession(family)


def test_memory_is_bounded_and_what_is_in_memory_is_not_loaded_again(family):
    session, clock = elastic(family, policy=Policy(dwell_s=0.01), max_loaded=2)
    for signal in (0.5, 1.0, 0.5, 0.0, 1.0):
        session.signal = signal
        served(session, 20)
        assert len(session.loaded) <= 2
    assert clock.opened == ["large", "medium", "small", "large", "small"]
    session, clock = elastic(family, policy=Policy(dwell_s=0.01), max_loaded=3)
    for signal in (0.5, 1.0, 0.5, 0.0, 1.0):
        session.signal = signal
        served(session, 20)
    assert clock.opened == ["large", "medium", "small"]


def test_bytes_bound_memory_too(family):
    for name, padding in (("large", 3000), ("medium", 2000), ("small", 10)):
        write_model(family / f"{name}.onnx", {"large": 1, "medium": 2, "small": 3}[name], padding=padding)
    variants = [Variant(n, family / f"{n}.onnx", c) for n, c in (("large", 8), ("medium", 4), ("small", 2))]
    sizes = {v.name: v.path.stat().st_size for v in variants}
    bound = sizes["large"] + sizes["medium"]
    with pytest.raises(ElasticError, match=f"at least {bound}"):
        ElasticSession(variants, max_bytes=bound - 1)
    session, _ = elastic(variants, policy=Policy(dwell_s=0.01), max_loaded=3, max_bytes=bound)
    for signal in (0.5, 1.0, 0.0, 0.5):
        session.signal = signal
        served(session, 20)
        assert session.metrics()["loaded_bytes"] <= bound
    assert session.variant == "medium"


def test_a_variant_that_is_let_go_ends_its_runs_before_another_is_loaded(family):
    inside, finish, opened = threading.Event(), threading.Event(), []

    class Slow:
        def __init__(self, path):
            opened.append(path.stem)
            self.stem, self.inner = path.stem, onnxruntime.InferenceSession(str(path))

        def run(self, *call):
            if self.stem == "large" and call[1]["x"][0, 0] == 9:
                inside.set()
                finish.wait(20)
            return self.inner.run(*call)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    session = ElasticSession(family, policy=Policy(dwell_s=0.0), open_file=Slow)
    results = []
    held = threading.Thread(target=lambda: results.append(session.run(None, {"x": 9 * X})[0][0, 0]))
    held.start()
    assert inside.wait(20)
    session.signal = 0.5
    assert served(session, 2)[-1] == 2
    session.signal = 1.0
    session.run(None, {"x": X})  # large has to go for small, and is still at work
    time.sleep(0.1)
    assert opened == ["large", "medium"]
    assert session.run(None, {"x": X})[0][0, 0] == 2
    loading = session._loading  # waits for large, so it is still there
    finish.set()
    held.join()
    loading.join()
    assert results == [9.0]
    assert opened == ["large", "medium", "small"]
    assert served(session)[-1] == 3
    session.close()


def test_no_run_fails_or_is_wrong_while_many_threads_run_and_variants_switch(family):
    levels = iter(np.random.default_rng(0).random(100_000))
    lock = threading.Lock()

    def signal():
        with lock:
            return float(next(levels))

    errors, stop = [], time.monotonic() + 2.0
    session = ElasticSession(family, policy=Policy(dwell_s=0.005, band=0.0), signal=signal, max_loaded=2)
    counts = [0] * 8

    def hammer(mine):
        value = np.full((1, 4), mine + 1, np.float32)
        while time.monotonic() < stop:
            try:
                ratio = session.run(None, {"x": value})[0] / value
                if not (ratio == ratio[0, 0]).all() or ratio[0, 0] not in (1, 2, 3):
                    errors.append(ratio)
                if len(session.loaded) > 2:
                    errors.append(session.loaded)
            except Exception as error:  # noqa: BLE001
                errors.append(error)
            counts[mine] += 1

    threads = [threading.Thread(target=hammer, args=(mine,)) for mine in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = session.metrics()
    session.close()
    assert errors == []
    assert sum(metrics["runs_total"].values()) == sum(counts)
    assert sum(metrics["switches_total"].values()) >= 5
    assert metrics["failures"] == {}


def test_an_error_of_the_caller_is_the_callers_and_counted(family):
    with ElasticSession(family) as session:
        with pytest.raises(Exception, match="nothing"):
            session.run(None, {"nothing": X})
        assert session.metrics()["run_errors_total"] == {"large": 1}
        assert served(session) == [1]


def test_events_are_json_lines_and_counters_prometheus_text(family, tmp_path):
    log = tmp_path / "events.jsonl"
    session, _clock = elastic(family, policy=Policy(target_ms=5, dwell_s=0.02, window=5), log=log)
    served(session, 30)
    session.close()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "switch", "close"]
    assert (events[1]["before"], events[1]["variant"]) == ("large", "medium")
    assert sum(events[2]["runs_total"].values()) == 30
    lines = session.prometheus().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert (
        values['elastic_runs_total{variant="large"}'] + values['elastic_runs_total{variant="medium"}'] == 30
    )
    assert values['elastic_serving{variant="medium"}'] == 1
    assert (
        values['elastic_deadline_misses_total{variant="large"}']
        == values['elastic_runs_total{variant="large"}']
    )
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {k.split("{")[0] for k in values}
    )


def test_a_log_that_cannot_be_written_fails_no_inference(family, tmp_path):
    with ElasticSession(family, log=tmp_path / "nowhere" / "log") as session:
        assert served(session) == [1]
        assert session.metrics()["log_errors_total"] == {"": 1}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "describes no variants"),
        ("{}", "describes no variants"),
        ('{"variants": [{"name": "a"}]}', "describes no variants"),
        ('{"variants": []}', "at least one"),
        ('{"variants": [{"name": "a", "file": "../a.onnx", "cost": 1}]}', "outside"),
        ('{"variants": [{"name": "a", "file": "a.onnx", "cost": 0}]}', "cost above 0"),
        ('{"variants": [{"name": "a", "file": "a.onnx", "cost": NaN}]}', "cost above 0"),
        (
            '{"variants": [{"name": "a", "file": "a", "cost": 1}, {"name": "a", "file": "b", "cost": 2}]}',
            "two variants",
        ),
    ],
    ids=["no JSON", "no list", "no file", "none", "outside", "free", "NaN", "same name"],
)
def test_a_malformed_family_is_refused(tmp_path, content, match):
    (tmp_path / "elastic.json").write_text(content)
    with pytest.raises(ElasticError, match=match):
        ElasticSession(tmp_path)


def test_wrong_arguments_are_refused(family):
    with pytest.raises(ElasticError, match="not both"):
        ElasticSession(family, target_ms=1, policy=Policy())
    with pytest.raises(ElasticError, match="max_loaded"):
        ElasticSession(family, max_loaded=1)
    with pytest.raises(ElasticError, match="describes no variants"):
        ElasticSession(family / "nowhere")


ALONE = """
import sys
for name in ("torch", "pytorch_lightning", "lightning", "lightning_prune", "onnx", "yaml", "rich"):
    sys.modules[name] = None
import numpy as np
from elastic import ElasticSession
with ElasticSession(sys.argv[1], target_ms=50.0) as session:
    print(float(session.run(None, {"x": np.ones((1, 4), np.float32)})[0][0, 0]))
"""


def test_the_file_alone_works_without_this_package_or_torch(family, tmp_path):
    shutil.copy(runtime.__file__, tmp_path / "elastic.py")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(family)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"


PACKAGE = """
import sys
for name in ("torch", "pytorch_lightning", "lightning", "onnx", "yaml", "rich"):
    sys.modules[name] = None
import numpy as np
from lightning_prune.runtime import ElasticSession
with ElasticSession(sys.argv[1]) as session:
    print(float(session.run(None, {"x": np.ones((1, 4), np.float32)})[0][0, 0]))
"""


def test_the_package_gives_it_where_torch_is_not_installed(family):
    done = subprocess.run(
        [sys.executable, "-c", PACKAGE, str(family)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
