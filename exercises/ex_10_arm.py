"""Exercise 10: a control arm, and its verdict on nothing.

Difficulty 3/5 - Importance 5/5 - 45 minutes

A gain of generated images means little if something cheaper gains as much. Add such a control: the
hard cases again, mirrored. Then ask the instrument itself: if all arms are equally good, how often
does the verdict claim a gain?

Predict first: the training already mirrors at random. What will the arm gain over `replay`? Of 12
verdicts on arms that do not differ, at 95 % for both controls at once, how many will claim that
guided is better than both?

Write both functions. To run the arm, copy `mirrored` into extras/children.py, import it in loop.py
with the others there, add it to PLAIN (it needs no diffusion model) and a line to the table ARMS,
"flipped": Arm(mirrored, filtered=False), and to README's table of arms a row in the same place (a
test holds the two together): a dozen lines in all. The tests that count lines and words go red,
since both are full here; in your fork, raise the limits. Then, in half a minute, with a verdict on
your arm (without guided it is the one asked about):

    python loop.py --config configs/tiny.yaml --set loop.rounds=1 \\
        --set loop.arms=[real,replay,flipped]

    python -m pytest exercises/test_10_arm.py

What you should see: 3 passed. On 12 null data sets at most 1 verdict claims a gain; where guided is
made better on purpose, at least 5 of 6 do.
Where the answer stands: `copied` in extras/children.py; exercises/solutions/ex_10_arm.py.
"""


def mirrored(kit, parents, targets, objectives):
    """guidance.Drawn of every parent's image (parents.images, uint8 (N, 3, H, W)), mirrored left to
    right."""
    raise NotImplementedError


def null_probs(labels, arms, seeds, rng):
    """{arm: (seeds, N, 4) probabilities} of students that are equally good in every arm.
    What makes an image easy or hard is shared by all; beside it every student has noise of its own.
    labels: (N,) in 0..3; about 60 to 90 % should be right; rng: np.random.Generator."""
    raise NotImplementedError
