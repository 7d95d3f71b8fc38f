"""The retention guard: where its limit lies."""

from hf_speechllm.training.checkpointing.retention import RETENTION_METRIC, RetentionGuard


def history(*cers):
    return [{"step": step, RETENTION_METRIC: cer} for step, cer in enumerate(cers)]


def test_loss_of_exactly_the_limit_passes_and_a_hundredth_more_does_not():
    for base in range(1, 50):
        for limit in (0.5, 1, 2, 3.5):
            guard = RetentionGuard(limit, stop=True)
            log = history(base / 100)
            exactly, more = ((100 * base + 100 * limit + beyond) / 10_000 for beyond in (0, 1))
            assert guard.passes(exactly, log) and not guard.passes(more, log), (base, limit)
    assert 100 * (0.13 - 0.11) > 2  # the difference of floating-point numbers is above the limit


def test_last_good_step_is_the_latest_within_the_limit():
    guard = RetentionGuard(2.0, stop=True)
    assert guard.last_good_step(history(0.11, 0.14, 0.13, 0.131)) == 2
    assert guard.last_good_step(history(0.11, 0.14)) == 0
