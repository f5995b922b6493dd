"""The engine from Python: products equal those of the expanded weight, and what does not fit is refused by name."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import DataError, TargetError
from secateur.runtime import kernels
from secateur.runtime.formats import Format, expand, pack

pytestmark = pytest.mark.skipif(bool(kernels.why_missing()), reason=kernels.why_missing())

FORMATS = [
    Format(kind, height, values)
    for kind, height in (("bitmask", 1), ("blocks", 1), ("blocks", 4), ("blocks", 16))
    for values in ("float32", "bfloat16", "int8")
]
SIZES = [0, 1, 2, 3, 5, 15, 16, 17, 31, 64, 65, 100, 257]
TOKENS = [0, 1, 2, 3, 5, 16, 17, 63, 64, 65, 130]
AFTER = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(params=kernels.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        with kernels.use(request.param):
            yield request.param
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weight_of(draw: random.Random, rows: int, cols: int, height: int = 1) -> Tensor:
    block_rows = -(-rows // height)
    mask = torch.rand(block_rows, cols) < draw.choice([0, 0.02, 0.1, 0.3, 0.7, 1])
    mask[torch.rand(block_rows) < 0.1] = False
    return torch.randn(rows, cols) * mask.repeat_interleave(height, 0)[:rows]


def scattered(value: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([value, -value], -1)[..., 0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5 * (1 + expected.abs().max().item()))


@pytest.mark.parametrize("seed", range(100))
def test_linear_equals_the_expanded_weight(isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    format = draw.choice(FORMATS)
    rows, cols, tokens = draw.choice(SIZES), draw.choice(SIZES), draw.choice(TOKENS)
    packed = pack(weight_of(draw, rows, cols, format.height), format)
    x = torch.randn(tokens, cols)
    bias = torch.randn(rows) if draw.random() < 0.5 else None
    residual = torch.randn(tokens, rows) if draw.random() < 0.4 else None
    activation = draw.choice(list(AFTER))
    product = x.double() @ expand(packed).double().T
    sums = product + sum(v.double() for v in (bias, residual) if v is not None)
    expected = AFTER[activation](sums) if sums.numel() else sums
    if draw.random() < 0.5:
        x, residual = scattered(x), residual if residual is None else scattered(residual)
    found = kernels.linear(x, packed, bias, residual, activation)
    assert found.shape == (tokens, rows)
    if found.numel():
        close(found, expected)


@pytest.mark.parametrize("seed", range(60))
def test_conv_equals_the_expanded_weight(isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    format = draw.choice(FORMATS)
    kernel = draw.choice([(1, 1), (3, 3), (5, 5), (1, 3), (2, 4)])
    stride, padding, dilation = (tuple(draw.choices(choices, k=2)) for choices in ([1, 1, 2], [0, 1, 2], [1, 1, 2]))
    channels, rows = draw.choice([1, 2, 3, 8, 140]), draw.choice([1, 4, 17, 40])
    packed = pack(weight_of(draw, rows, channels * kernel[0] * kernel[1], format.height), format)
    x = torch.randn(draw.choice([0, 1, 3]), channels, draw.choice([9, 16, 33]), draw.choice([9, 16, 20]))
    bias = torch.randn(rows) if draw.random() < 0.5 else None
    weight = expand(packed).double().view(rows, channels, *kernel)
    expected = F.conv2d(x.double(), weight, None if bias is None else bias.double(), stride, padding, dilation)
    residual = torch.randn(expected.shape) if draw.random() < 0.4 else None
    activation = draw.choice(["", "relu"])
    expected = AFTER[activation](expected if residual is None else expected + residual.double())
    found = kernels.conv(scattered(x), packed, bias, residual, activation, (kernel, stride, padding, dilation))
    assert found.shape == expected.shape
    if found.numel():
        close(found, expected)


@pytest.mark.parametrize("seed", range(30))
def test_max_pool_is_torchs_to_the_bit(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kernel, stride = ([draw.choice([1, 2, 3, 5]) for _ in range(2)] for _ in range(2))
    padding = [draw.randint(0, size // 2) for size in kernel]
    x = torch.randn(draw.choice([0, 1, 3]), draw.choice([1, 7]), draw.choice([5, 9, 20]), draw.choice([5, 16, 33]))
    x[torch.rand(x.shape) < 0.02] = draw.choice([float("nan"), -float("inf"), 0.0])
    expected = F.max_pool2d(x, kernel, stride, padding) if len(x) else x.new_empty(0)
    found = kernels.max_pool(scattered(x), kernel, stride, padding)
    assert not len(x) or found.shape == expected.shape
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "message"),
    [
        (torch.ones(2, 5, 5), (2, 2), (0, 0), r"shape \(batch, channels, height, width\)"),
        (torch.ones(1, 2, 5, 5).double(), (2, 2), (0, 0), "found x of torch.float64"),
        (torch.ones(1, 2, 5, 5), (3, 3), (2, 0), "padding is more than half of the kernel"),
        (torch.ones(1, 2, 1, 5), (3, 3), (0, 0), "larger than the padded image"),
        (torch.ones(1, 2, 0, 5), (2, 2), (1, 0), "larger than the padded image"),
    ],
)
def test_what_cannot_be_pooled_is_named(x: Tensor, kernel: tuple, padding: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kernels.max_pool(x, kernel, (1, 1), padding)


def quantized_reference(x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    most = x.abs().amax(1)
    scale, inverse = most / 127, torch.full_like(most, 127.0) / most
    q = (x * inverse[:, None]).round()
    return (q.double() @ integers.double().T).float() * scale[:, None] * scales


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 100])
def test_quantized_activations_are_added_up_exactly(isa: str, tokens: int) -> None:
    integers = torch.randint(-127, 128, (37, 300)) * (torch.rand(37, 300) < 0.3)
    integers[:, 7] = 127
    scales = torch.rand(37) + 0.01
    packed = pack(integers * scales[:, None], Format("blocks", 4, "int8"))
    scales = (integers * scales[:, None]).abs().amax(1) / 127
    x = torch.randn(tokens, 300) * torch.logspace(-20, 20, tokens)[:, None]
    found = kernels.linear(x, packed, None, None, "", quantize=True)
    assert torch.equal(found, quantized_reference(x, integers, scales))


def test_quantized_tokens_without_a_scale(isa: str) -> None:
    packed = pack(torch.ones(5, 3), Format("blocks", 4, "int8"))
    x = torch.tensor([[1.0, 2, 3], [0, 0, 0], [1e-35, 0, 0], [1, float("nan"), 2], [1, 2, -float("inf")], [3, 2, 1]])
    bias = torch.arange(5.0)
    found = kernels.linear(x, packed, bias, None, "relu", quantize=True)
    assert found[[3, 4]].isnan().all()
    assert torch.equal(found[[1, 2]], bias.expand(2, 5))
    torch.testing.assert_close(found[[0, 5]], 6 + bias.expand(2, 5), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("format", [f for f in FORMATS if f != Format("blocks", 4, "int8")], ids=str)
def test_activations_are_quantized_for_one_format_only(format: Format) -> None:
    packed = pack(torch.ones(4, 4), format)
    with pytest.raises(DataError, match="quantized only for int8 blocks of 4 rows"):
        kernels.linear(torch.ones(2, 4), packed, None, None, "", quantize=True)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("format", [f for f in FORMATS if f.height == 1], ids=str)
def test_weights_that_are_not_stored_touch_nothing(isa: str, format: Format, tokens: int) -> None:
    weight = torch.zeros(20, 70)
    weight[:, ::7] = 1
    x = torch.ones(tokens, 70)
    x[:, 1], x[:, 69], x[:, 68] = float("nan"), float("inf"), -float("inf")
    assert torch.equal(kernels.linear(x, pack(weight, format), None, None, ""), torch.full((tokens, 20), 10.0))
    x[0, 7] = float("nan")
    found = kernels.linear(x, pack(weight, format), None, None, "")
    assert found[0].isnan().all()
    assert torch.equal(found[1:], torch.full((tokens - 1, 20), 10.0))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_two_threads_compute_what_one_does(threads: None, format: Format, tokens: int) -> None:
    packed = pack(weight_of(random.Random(3), 700, 900, format.height) + torch.eye(700, 900), format)
    x = torch.randn(tokens, 900)
    torch.set_num_threads(1)
    one = kernels.linear(x, packed, None, None, "gelu")
    torch.set_num_threads(2)
    assert torch.equal(kernels.linear(x, packed, None, None, "gelu"), one)


def test_leading_dimensions_stay() -> None:
    packed = pack(torch.randn(6, 4), Format("blocks"))
    x = torch.randn(2, 3, 4)
    close(kernels.linear(x, packed, None, None, ""), x.double() @ expand(packed).double().T)
    assert kernels.linear(x[0, 0], packed, None, None, "").shape == (6,)


X, PACKED = torch.ones(2, 4), pack(torch.ones(6, 4), Format("blocks"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 5), PACKED, None, None, ""), r"has 4 inputs, found activations of shape \[2, 5\]"),
        ((torch.tensor(1.0), PACKED, None, None, ""), r"has 4 inputs, found activations of shape \[\]"),
        ((X.double(), PACKED, None, None, ""), "takes float32 on the CPU, found x of torch.float64 on cpu"),
        ((X.bfloat16(), PACKED, None, None, ""), "found x of torch.bfloat16"),
        ((X.to("meta"), PACKED, None, None, ""), "found x of torch.float32 on meta"),
        ((X, PACKED, torch.ones(5), None, ""), r"expected bias of shape \[6\], found \[5\]"),
        ((X, PACKED, torch.ones(6).double(), None, ""), "found bias of torch.float64"),
        ((X, PACKED, None, torch.ones(6), ""), r"expected residual of shape \[2, 6\], found \[6\]"),
        ((X, PACKED, None, torch.ones(2, 6).half(), ""), "found residual of torch.float16"),
        ((X, PACKED, None, None, "tanh"), "activation 'tanh' is unknown; expected one of"),
        ((X, PACKED.float(), None, None, ""), "a flat uint8 tensor on the CPU, found torch.float32"),
        (
            (X, PACKED.clone().view(-1, 64), None, None, ""),
            "a flat uint8 tensor on the CPU, found torch.uint8 of shape",
        ),
        ((X, torch.stack([PACKED, PACKED], 1)[:, 0], None, None, ""), "a flat uint8 tensor on the CPU"),
        ((X, PACKED.to("meta"), None, None, ""), "on meta"),
    ],
)
def test_what_does_not_fit_a_linear_layer_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kernels.linear(*arguments)


@pytest.mark.parametrize(
    ("x", "walk", "message"),
    [
        (torch.ones(1, 2, 5), ((2, 2), (1, 1), (0, 0), (1, 1)), r"expected activations of shape \(batch, 1, "),
        (torch.ones(1, 2, 5, 5), ((2, 2), (1, 1), (0, 0), (1, 1)), r"expected activations of shape \(batch, 1, "),
        (torch.ones(1, 1, 5, 5).double(), ((2, 2), (1, 1), (0, 0), (1, 1)), "found x of torch.float64"),
        (torch.ones(1, 1, 5, 5), ((2, 2), (0, 1), (0, 0), (1, 1)), "at least 1"),
        (torch.ones(1, 1, 5, 5), ((2, 2), (1, 1), (-1, 0), (1, 1)), "padding is not negative"),
        (torch.ones(1, 1, 1, 5), ((2, 2), (1, 1), (0, 0), (1, 1)), "larger than the padded image"),
        (torch.ones(1, 1, 1, 5), ((2, 2), (1, 1), (0, 0), (3, 1)), "larger than the padded image"),
    ],
)
def test_what_does_not_fit_a_convolution_is_named(x: Tensor, walk: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kernels.conv(x, PACKED, None, None, "", walk)


def test_damaged_bytes_are_refused() -> None:
    damaged = pack(torch.ones(6, 4), Format("blocks"))
    damaged[8] = 9
    with pytest.raises(DataError, match="damaged: a packed weight of another version"):
        kernels.linear(X, damaged, None, None, "")
    with pytest.raises(DataError, match="damaged: the bytes are not as many"):
        kernels.linear(X, pack(torch.ones(6, 4), Format("blocks"))[:-64], None, None, "")


def test_a_change_in_place_is_noticed() -> None:
    packed = pack(torch.ones(6, 4), Format("blocks"))
    assert torch.equal(kernels.linear(X, packed, None, None, ""), torch.full((2, 6), 4.0))
    packed.copy_(pack(torch.full((6, 4), 2.0), Format("blocks")))
    assert torch.equal(kernels.linear(X, packed, None, None, ""), torch.full((2, 6), 8.0))
    indices = bytes(packed.numpy().tobytes()).index(bytes([0, 1, 1, 1]))  # distances of the first row
    packed[indices] = 200
    with pytest.raises(DataError, match="column indices are out of range"):
        kernels.linear(X, packed, None, None, "")


def test_memory_that_is_used_again_is_read_again() -> None:
    for value in range(20):
        packed = pack(torch.full((6, 4), float(value + 1)), Format("blocks"))
        assert torch.equal(kernels.linear(X, packed, None, None, ""), torch.full((2, 6), 4.0 * (value + 1)))
        del packed


def test_an_instruction_set_lasts_as_long_as_its_block() -> None:
    before = kernels.isa()
    with kernels.use("portable"):
        assert kernels.isa() == "portable"
    assert kernels.isa() == before
    with pytest.raises(TargetError, match="'sse9'"), kernels.use("sse9"):
        pass
