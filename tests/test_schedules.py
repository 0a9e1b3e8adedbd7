"""Schedules: hand-computed values, bounds, direction, and equality with USB's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import muscle_plugin.usb.names  # noqa: F401  (makes semilearn importable with this torch and timm)
from muscle_plugin.schedules import (
    constant,
    cosine,
    ema_momentum,
    schedule,
    sigmoid_rampup,
    usb_cosine,
)

STEPS = st.floats(0, 1e6)
LENGTHS = st.floats(1e-3, 1e6)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (cosine(0, 210), 1),
        (cosine(70, 210), 0.75),
        (cosine(105, 210), 0.5),
        (cosine(180, 210), (1 - math.cos(math.pi / 7)) / 2),
        (cosine(210, 210), 0),
        (cosine(300, 210), 0),
        (usb_cosine(0, 1000), 1),
        (usb_cosine(1000, 1000), math.sin(math.pi / 16)),
        (usb_cosine(5, 110, warmup=10), 0.5),
        (usb_cosine(10, 110, warmup=10), 1),
        (usb_cosine(60, 110, warmup=10, num_cycles=0.5), math.sqrt(0.5)),
        (usb_cosine(110, 110, warmup=10, num_cycles=1), 0),
        (constant(7), 1),
        (sigmoid_rampup(0, 5), math.exp(-5)),
        (sigmoid_rampup(2.5, 5), math.exp(-1.25)),
        (sigmoid_rampup(5, 5), 1),
        (sigmoid_rampup(9, 5), 1),
        (sigmoid_rampup(0, 0), 1),
        (ema_momentum(0, 0.97), 0),
        (ema_momentum(1, 0.97), 0.5),
        (ema_momentum(32, 0.97), 32 / 33),
        (ema_momentum(33, 0.97), 0.97),
    ],
)
def test_values_by_hand(value, expected):
    assert value == pytest.approx(expected, abs=1e-12)


@given(STEPS, STEPS, LENGTHS)
def test_directions_and_bounds(a, b, length):
    first, second = sorted((a, b))
    falling = [cosine, lambda s, n: usb_cosine(s, 1e6)]
    rising = [sigmoid_rampup, lambda s, n: ema_momentum(s, 0.999)]
    for f in falling:
        assert 0 <= f(second, length) <= f(first, length) <= 1
    for f in rising:
        assert 0 <= f(first, length) <= f(second, length) <= 1


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0.1, 2))
def test_the_average_with_warmed_up_momentum_begins_as_the_mean(n, seed, scale):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    average = 0.0
    for step, value in enumerate(values.tolist()):
        momentum = ema_momentum(step, 1.0)
        average = momentum * average + (1 - momentum) * value
    assert average == pytest.approx(values.mean().item(), abs=1e-9)


@pytest.mark.parametrize(
    ("total", "warmup", "cycles"), [(50, 0, 7 / 16), (200, 20, 7 / 16), (64, 64, 7 / 16), (90, 7, 1.5), (1, 0, 0.5)]
)
def test_usb_is_usbs_over_all_steps_and_beyond(total, warmup, cycles):
    from semilearn.core.utils import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, total, cycles, warmup).lr_lambdas[0]
    ours = schedule("usb", total, warmup=warmup, num_cycles=cycles)
    assert [ours(k) for k in range(total + 10)] == [theirs(k) for k in range(total + 10)]


def test_a_cosine_may_reach_zero_after_the_run():
    setting_1 = schedule("cosine", 180, reaches_zero_at=210 / 180)
    assert [setting_1(e) for e in (0, 90.5, 180)] == pytest.approx([cosine(e, 210) for e in (0, 90.5, 180)])
    assert setting_1(180) == pytest.approx(0.0495, abs=1e-4)
    assert schedule("cosine", 180)(180) == 0


@given(st.sampled_from(["usb", "cosine", "constant"]), st.integers(1, 10**6), st.floats(0, 1))
def test_every_schedule_is_a_share_and_begins_whole(name, total, share):
    multiplier = schedule(name, total)
    assert multiplier(0) == 1
    assert 0 <= multiplier(share * total) <= 1


def test_schedules_drive_torchs_scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("cosine", 10, reaches_zero_at=2))
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    scheduler.load_state_dict(scheduler.state_dict())


@pytest.mark.parametrize(
    ("name", "total", "options", "message"),
    [
        ("cosin", 10, {}, "'cosin'.* usb, cosine, constant"),
        ("usb", 0, {}, r"total_steps .*\b0\b"),
        ("cosine", math.inf, {}, "total_steps .*inf"),
        ("constant", 10, {"warmup": 1}, "warmup .*usb"),
        ("usb", 10, {"reaches_zero_at": 2}, "reaches_zero_at .*cosine"),
        ("usb", 10, {"warmup": -1}, r"warmup .*\b0 .*\b10 .*-1\b"),
        ("usb", 10, {"warmup": 11}, r"warmup .*\b0 .*\b10 .*\b11\b"),
        ("usb", 10, {"num_cycles": -1}, r"num_cycles .*\b0 .*-1\b"),
        ("cosine", 10, {"reaches_zero_at": 0.9}, r"reaches_zero_at .*\b1 .*\b0\.9\b"),
        ("cosine", 10, {"reaches_zero_at": math.nan}, r"reaches_zero_at .*\b1 .*\bnan\b"),
    ],
)
def test_bad_schedules_are_one_line(name, total, options, message):
    with pytest.raises(ValueError, match=message) as e:
        schedule(name, total, **options)
    assert "\n" not in str(e.value)
