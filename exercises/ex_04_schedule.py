"""Exercise 4: a schedule, and the strip.

Difficulty 2/5 - Importance 3/5 - 20 minutes

Nichol & Dhariwal 2021, Eq. 17: with u running in T even strides from 0 to 1,

    abar(u) = f(u) / f(0),   f(u) = cos^2((u + 0.008) / 1.008 * pi / 2),

and beta_t = 1 - abar_t / abar_{t-1}, at most 0.999 so that the last step does not divide by 0. What
a sampler uses is the running product of 1 - beta_t.

Predict first: the linear schedule (beta from 0.0001 to 0.02, T = 1000) and this one: at t = 500,
which one has more of the image left?

Write the schedule, then the strip: the same image at `count` levels, evenly spaced over 0..T-1.

    python -m pytest exercises/test_04_schedule.py

What you should see: 4 passed; at t = 500 of 1,000 this schedule has abar 0.49, the linear 0.08.
To look at the strip: python examples/forward.py runs/NAME.
Where the answer stands: ddpm.Schedule.__init__, and main in examples/forward.py.
"""


def cosine(T):
    """abar of the code's t = 0..T-1 (the paper's 1..T): (T,) float64, a torch tensor."""
    raise NotImplementedError


def strip(abar, x0, eps, count):
    """x0 (C, H, W) noised with eps to `count` levels, the first 0, the last T-1: (count, C, H, W).
    abar: (T,)."""
    raise NotImplementedError
