"""OpenStax *U.S. History* (2014)."""

from qwen_ray.data.sources.openstax import book

SOURCE = book(
    "openstax_us_history",
    title="OpenStax U.S. History (2014): exercises with solutions, glossary, running text",
    domain_hint="history",
    repository="philschatz/us-history-book",
    commit="635ed5914eb2ea3768169b88e1119587cb037e82",
    size="3,300 records: 400 exercises, 1,200 of the glossary, 1,700 sentences with a name or year left out",
    narrative=True,
)
