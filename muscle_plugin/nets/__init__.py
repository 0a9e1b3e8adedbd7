"""Nets of this package. Each returns ``{"logits", "feat"}`` and takes ``only_fc``/``only_feat``, as USB's do."""

from muscle_plugin.nets.build import OWN_NETS, NetOptions, build_net, net_options

__all__ = ["OWN_NETS", "NetOptions", "build_net", "net_options"]
