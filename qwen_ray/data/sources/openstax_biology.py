"""OpenStax *Biology* (2014)."""

from qwen_ray.data.sources.openstax import book

SOURCE = book(
    "openstax_biology",
    title="OpenStax Biology (2014): exercises with solutions, glossary, running text",
    domain_hint="biology",
    repository="philschatz/biology-book",
    commit="cf3dc8c0d87f9dc4d0556464a4ac33b58dd9d726",
    size="9,900 records: 1,100 exercises, 6,800 of the glossary, 1,900 sentences with a term left out",
)
