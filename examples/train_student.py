"""Train one student, the classifier that diagnoses, and score it on val.

    python examples/train_student.py --config config.yaml
    python examples/train_student.py --config config.yaml --set classifier.steps=300

Writes a picture of the images of val that it is surest and wrong about.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shown import sheet

import classifier
import data
import evaluate
from arguments import output, parser
from engine import config as configuration
from engine.command import one_line
from engine.run import Progress, pick_device
from engine.training import seeded


@one_line("train_student.py")
def main(argv=None):
    asked = parser("train_student.py", __doc__)
    asked.add_argument("--out", type=output(".png"), default="student.png", help="the picture")
    arguments = asked.parse_args(argv)
    c = configuration.load(arguments.config, arguments.set)
    k, device, progress = c.classifier, pick_device(c.loop.device), Progress("student")
    splits = data.load(c.data)
    train, val = splits["train"], splits["val"]     # test is scored once, by loop.py

    # Rare classes are drawn as often as common ones; the start is random, not k.weights.
    network = seeded(c.loop.seed, classifier.build, k.network, c.data.size,
                     len(train.class_names)).to(device)
    arrays = train.images, train.labels, classifier.balanced_weights(train.labels)
    classifier.train(network, *(torch.tensor(a, device=device) for a in arrays),
                     steps=k.steps, batch=k.batch, lr=k.lr, jitter=k.jitter[0],
                     seed=c.loop.seed, on_step=lambda step, last, loss: progress(step, last))

    probs = classifier.predict(network, torch.tensor(val.images, device=device))
    once = np.ones((len(val), 1))                   # every image counts once
    found = evaluate.tables(probs[None], val.labels, np.array(val.malignant), once,
                            val.lesions, min_count=1)
    print(f"{len(val)} images of val:", ", ".join(
        f"{name.replace('_', ' ')} {table.item():.3f}" for name, table in found.items()))

    names, worst = val.class_names, data.margins(probs, val).argsort()[:16]
    said = [f"{names[val.labels[i]]} > {names[probs[i].argmax()]}" for i in worst]
    sheet(arguments.out, [val.images[worst[:8]], val.images[worst[8:]]],
          captions=[said[:8], said[8:]])
    print(f"wrote {arguments.out}: what it gets most wrong, class > answer")


if __name__ == "__main__":
    main()
