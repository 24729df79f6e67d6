"""Adapter versions: published once, found by name, alias or number, with all that was decided on them."""

from qwen_ray.registry.events import Event
from qwen_ray.registry.registry import Canary, Registry
from qwen_ray.registry.state import CANARY, CANDIDATE, PRODUCTION
from qwen_ray.registry.version import LINEAGE, MANIFEST, NAME, AdapterVersion

__all__ = [
    "CANARY",
    "CANDIDATE",
    "LINEAGE",
    "MANIFEST",
    "NAME",
    "PRODUCTION",
    "AdapterVersion",
    "Canary",
    "Event",
    "Registry",
]
