"""Dense runtimes of one model side by side, and a clock for them: what the sparse engine is compared with.

torch (eager), torch.compile (with frozen weights), ONNX Runtime and OpenVINO, each with the same weights, inputs and
threads. Every runtime's outputs are compared with eager torch's before it is timed. OpenVINO is not among this
project's packages: where it is missing the rows say so.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import math
import random
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.graph.types import example_args
from secateur.measure import Latency
from secateur.tasks import call

Run = Callable[[], Any]
Make = Callable[[], Run]

ROUNDS = 10
"""Rounds of timing at least."""

REST = 0.002
"""Seconds of silence before a call: threads of the runtime before it stop waiting in a loop, and free their cores."""

AWAKE = 0.003
"""Seconds of calls before one is timed: a core that has rested runs at half its speed for about a millisecond."""

BEYOND_CACHES = 2**27
"""Bytes of weights that are gone from every cache when their turn comes again."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.2}
"""What a runtime's outputs may differ from eager torch's in float32, relative to the largest."""


class Refused(Exception):
    """A runtime that is not here, cannot take the model, or says something else."""


def several(make: Make, weight_bytes: float, cold: bool) -> Run:
    """What ``make`` makes; where weights should come from memory so many of it, one after the other."""
    number = max(2, math.ceil(BEYOND_CACHES / weight_bytes)) if cold else 1
    turns = itertools.cycle([make() for _ in range(number)])
    return lambda: next(turns)()


def dense(model: nn.Module, inputs: Any, threads: int, *, cold: bool = False) -> dict[str, tuple[str, Make]]:
    """By name the precision of every dense runtime and how to make it. Inputs: as for ``secateur.measure``."""
    torch._dynamo.reset()  # what was compiled for another number of threads, or is no longer there
    half = _to(inputs, torch.bfloat16)
    forms: dict[str, tuple[str, Make]] = {
        "torch": ("float32", lambda: eager(copy.deepcopy(model) if cold else model, inputs)),
        "torch.compile": ("float32", lambda: compiled(copy.deepcopy(model), inputs)),
        "onnxruntime": ("float32", lambda: onnxruntime(model, inputs, threads)),
        "openvino": ("float32", lambda: openvino(model, inputs, threads, "f32")),
        "torch bfloat16": ("bfloat16", lambda: eager(copy.deepcopy(model).bfloat16(), half)),
        "openvino bfloat16": ("bfloat16", lambda: openvino(model, inputs, threads, "bf16")),
    }
    return forms


def made(
    forms: Mapping[str, tuple[str, Make]], wanted: Any, weight_bytes: float, *, cold: bool = False
) -> tuple[dict[str, Run], dict[str, str]]:
    """The forms that work here, and why others do not; ``wanted`` is what all of them should say."""
    width = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.25}
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, (values, make) in forms.items():
        try:
            run = several(make, weight_bytes * width[values], cold)
            with torch.inference_mode():
                gap = difference(run(), wanted)
            if not gap <= TOLERANCE[values]:
                raise Refused(f"differs from torch by {gap:.2g} (relative)")
            found[name] = run
        except Refused as error:
            missing[name] = str(error)
        except Exception as error:  # a row says what a runtime said
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, missing


def eager(model: nn.Module, inputs: Any) -> Run:
    return lambda: call(model, inputs)


def compiled(model: nn.Module, inputs: Any, freezing: bool = True) -> Run:
    done = torch.compile(model.requires_grad_(False), options={"freezing": freezing})
    with torch.inference_mode():
        call(done, inputs)
    return lambda: call(done, inputs)


def onnxruntime(model: nn.Module, inputs: Any, threads: int, change: Callable[[Path], Path] | None = None) -> Run:
    """``change``: what becomes of the file before it is read, such as quantization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with onnx_file(model, inputs) as path:
        path = change(path) if change is not None else path
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, (v.numpy() for v in _leaves(inputs)), strict=True))
    return lambda: [torch.from_numpy(v) for v in session.run(None, feed)]


def openvino(model: nn.Module, inputs: Any, threads: int, precision: str) -> Run:
    if importlib.util.find_spec("openvino") is None:
        raise Refused("openvino is not installed; pip install openvino")
    import openvino as ov

    wishes = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    core = ov.Core()
    with onnx_file(model, inputs) as path:
        request = core.compile_model(core.read_model(path), "CPU", wishes).create_infer_request()
    feed = [v.numpy() for v in _leaves(inputs)]

    def run() -> list[Tensor]:
        found = request.infer(feed, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(v) for v in found.values()]

    return run


@contextmanager
def onnx_file(model: nn.Module, inputs: Any) -> Iterator[Path]:
    """The model as an ONNX file for exactly these inputs; it goes with its folder."""
    args, kwargs = example_args(inputs)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(copy.deepcopy(model), args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        path = Path(folder) / "model.onnx"
        program.save(path, external_data=sum(p.nbytes for p in model.parameters()) > 2**30)
        del program
        gc.collect()
        yield path


def quantized(path: Path) -> Path:
    """The same with weights in 8 bits, and activations in each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_name("int8.onnx")
    quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
    return small


# --- the clock ---------------------------------------------------------------------------------------


def rounds(runs: Mapping[str, Run], seconds: float) -> dict[str, Latency]:
    """Milliseconds of single calls, one a round, in random order.

    Each comes after a rest, and after calls of the same form that are not timed, for as long as a processor needs to be
    awake again: in a network, too, the layer before has just run the same code. Forms made by ``several`` read other
    weights in those calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    with torch.inference_mode():
        for run in runs.values():
            run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[order[0]]) < ROUNDS:
            shuffle(order)
            for name in order:
                time.sleep(REST)
                awake = time.perf_counter() + AWAKE
                runs[name]()
                while time.perf_counter() < awake:
                    runs[name]()
                start = time.perf_counter()
                runs[name]()
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Latency(tuple(taken), torch.get_num_threads()) for name, taken in samples.items()}


@contextmanager
def others() -> Iterator[dict[str, float]]:
    """Inside, counts how many processors other programs kept busy; the dict has it as "others" at the end (Linux)."""
    found: dict[str, float] = {}
    start, before = time.perf_counter(), _busy()
    yield found
    wall = time.perf_counter() - start
    found["others"] = round(max(0.0, _busy() - before) / wall, 2)


def _busy() -> float:
    """Processor seconds of everybody but this process."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, path.read_text().split("\n", 1)[0].split()[1:])
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + soft + steal) / 100 - mine.ru_utime - mine.ru_stime


READ = 2**28
"""Bytes that ``read`` reads."""


def read() -> Run:
    """Torch's sum of a tensor that no cache holds: what these threads read from memory, at best."""
    large = torch.ones(READ // 4)
    return large.sum


def difference(found: Any, wanted: Any) -> float:
    """The largest difference of any floating-point output, relative to its largest value."""
    gaps = []
    for a, b in zip(_floats(found), _floats(wanted), strict=True):
        gap = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)
        gaps.append(float(gap) if a.shape == b.shape else math.inf)
    return max(gaps, default=0.0)


def spread(latency: Latency) -> list[float]:
    """Median, 10th and 90th percentile, as rows keep it."""
    return [round(v, 5) for v in latency.spread]


def ratio(latency: Latency, baseline: Latency) -> list[float]:
    """How many times faster than the baseline: the median over paired rounds, 10th and 90th percentile."""
    value, low, high = latency.ratio(baseline)
    return [round(1 / value, 3), round(1 / high, 3), round(1 / low, 3)]


def _leaves(inputs: Any) -> Sequence[Tensor]:
    return [v for v in tree_leaves(inputs) if isinstance(v, Tensor)]


def _floats(output: Any) -> list[Tensor]:
    return [v for v in _leaves(output) if v.dtype.is_floating_point]


def _to(inputs: Any, dtype: torch.dtype) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.dtype.is_floating_point else v, inputs)
