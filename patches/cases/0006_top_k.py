"""`evaluate` works with fewer than five classes, and where the evaluation images lack a class."""

import numpy as np
import torch
from semilearn.core.utils import EMA
from sklearn.metrics import top_k_accuracy_score
from small import algorithm, settings


def evaluated(classes, logits, targets):
    """What `evaluate` returns for given logits, on any device."""
    fixmatch = algorithm(settings(num_classes=classes))
    fixmatch.ema = EMA(fixmatch.model, 0.999)
    fixmatch.ema.register()
    fixmatch.loader_dict["eval"] = [{}]
    fixmatch.get_logits = lambda data, out_key: torch.tensor(logits)
    fixmatch.get_targets = lambda data: torch.tensor(targets)
    return fixmatch.evaluate()


logits = np.random.default_rng(0).normal(size=(40, 8))
targets = np.arange(40) % 8
assert np.isclose(evaluated(8, logits, targets)["eval/top-5-acc"], top_k_accuracy_score(targets, logits, k=5))
faults = []
for what, classes, present in (("two classes", 2, targets % 2), ("a class without images", 8, targets % 7)):
    try:
        found = evaluated(classes, logits[:, :classes], present)["eval/top-5-acc"]
    except ValueError as e:
        faults.append(f"{what}: {str(e).splitlines()[0][:70]}")
        continue
    best = np.argsort(logits[:, :classes])[:, -5:]
    assert found == np.mean([label in best[i] for i, label in enumerate(present)]), (what, found)
assert not faults, "; ".join(faults)
