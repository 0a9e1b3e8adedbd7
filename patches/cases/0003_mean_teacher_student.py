"""MeanTeacher compares the student with its teacher: the consistency loss is not 0 and reaches the gradient."""

import torch
from semilearn.core.utils import EMA
from small import algorithm, settings

mean_teacher = algorithm(settings(algorithm="meanteacher"))
mean_teacher.ema = EMA(mean_teacher.model, 0.999)
mean_teacher.ema.register()
mean_teacher.it = mean_teacher.num_train_iter  # the consistency loss is warmed up from 0
torch.manual_seed(0)
batch = {"x_lb": torch.rand(6, 3, 32, 32), "y_lb": torch.arange(6) % 3}
views = {"x_ulb_w": torch.rand(6, 3, 32, 32), "x_ulb_s": torch.rand(6, 3, 32, 32)}

gradients = []
for weight in (0.0, 10.0):
    mean_teacher.lambda_u = weight
    mean_teacher.model.zero_grad()
    out, log = mean_teacher.train_step(**batch, **views)
    out["loss"].backward()
    gradients.append(mean_teacher.model.conv1.weight.grad.clone())
assert log["train/unsup_loss"] > 0, "two different views of the images have a consistency loss of exactly 0"
assert not torch.allclose(*gradients), "the consistency loss has no gradient"
