"""OpenStax *Biology* (2014)."""

from qwen_ray.data.sources.openstax import book

SOURCE = book(
    "openstax_biology",
    title="OpenStax Biology (2014): exercises with solutions and glossary",
    domain_hint="biology",
    repository="philschatz/biology-book",
    commit="cf3dc8c0d87f9dc4d0556464a4ac33b58dd9d726",
)
