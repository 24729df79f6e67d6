"""Checks of Kubernetes manifests, Serve configs and cluster-launcher files, without a cluster.

:func:`qwen_ray.manifests.check.check` runs them all; docs/manifests.md says what they look for.
"""
