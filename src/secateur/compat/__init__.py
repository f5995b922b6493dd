"""Drop-ins for what others no longer maintain: ``from secateur.compat import prune`` for ``torch.nn.utils.prune``."""
