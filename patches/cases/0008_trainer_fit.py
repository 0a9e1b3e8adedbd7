"""`Trainer.fit` trains: the weights change, and so do the averaged ones."""

from semilearn import Trainer
from small import algorithm, loaders, settings

args = settings(num_train_iter=4, epoch=1, num_eval_iter=4, ema_m=0.9)
fixmatch = algorithm(args)
before = fixmatch.model.conv1.weight.detach().clone()
train_lb, train_ulb, eval_loader = loaders(args).values()
trainer = Trainer(args, fixmatch)
trainer.fit(train_lb, train_ulb, eval_loader)
assert not before.equal(fixmatch.model.conv1.weight.cpu()), "after fit the weights are what they were before"
assert not before.equal(fixmatch.ema.shadow["conv1.weight"].cpu()), "after fit the averaged weights are what they were"
trainer.evaluate(eval_loader, use_ema_model=True)
