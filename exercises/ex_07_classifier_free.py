"""Exercise 7: classifier-free guidance with two conditions.

Difficulty 3/5 - Importance 5/5 - 30 minutes

Ho & Salimans 2022: a network that was sometimes not told its class is also the unconditional model,
and the difference of the two is -sqrt(1 - abar_t) times the gradient of log p(y | x_t), of a
classifier that nobody trained:

    eps = eps(x_t) + scale * (eps(x_t, y) - eps(x_t));        scale is their 1 + w.

Here there are two conditions, a class y and a group g; -1 stands for "not told". One scale each:
first toward the class, from there toward the group of that class,

    eps = free + scale_y (eps_y - free) + scale_g (eps_yg - eps_y),

where free is told neither, eps_y the class alone (g is -1), eps_yg both.

Predict first: for which scales does the network have to be asked once, twice, three times? What
does scale 0 give? What does a scale above 1 do to the variety of what is drawn?

Write the function. If scale_y and scale_g are equal, only two of the three terms are left.

    python -m pytest exercises/test_07_classifier_free.py

What you should see: 3 passed. With one scale for both it is the program's own; with two, eps is
-sqrt(1 - abar_t) times the gradient of log p + scale_y log p(y | x) + scale_g log p(g | x, y),
taken by finite differences. How often the network was asked is not marked: compare with yours.
Where the answer stands: ddpm.eps_model (one scale), exercises/solutions/ex_07_classifier_free.py.
"""


def classifier_free(network, y, g, scale_y, scale_g):
    """eps_model(x_t, t) of a network(x_t, t, y, g) that predicts eps; y, g: (B,)."""
    raise NotImplementedError
