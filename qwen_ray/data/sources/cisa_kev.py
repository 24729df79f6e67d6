"""CISA's Known Exploited Vulnerabilities: what each is, and its product, kind of weakness or remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.questions import BLANK, as_sentence, choose
from qwen_ray.data.sources.archive import load_json
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import Entry, objects, slug, string
from qwen_ray.data.sources.weakness_kinds import kind_question
from qwen_ray.errors import UserError

NAME, LICENCE = "cisa_kev", "CC0-1.0"
_FILES = ("known_exploited_vulnerabilities.json", "known_exploited_vulnerabilities.json.gz")
INCOMPLETE = "no CVE, product or description"
_NO_PRODUCT = re.compile(r"multiple|various", re.I)
_END_OF_LIFE = re.compile(r"end[ -]of[ -]life|disconnect", re.I)
_WHAT = (
    "What is {cve} in {product}?",
    "Describe the vulnerability {cve} in {product}, which is known to be exploited.",
    "Attackers exploit {cve} in {product}. What is the flaw?",
)
_WHICH = (
    "Which product has this known exploited vulnerability ({cve})? {text}",
    "{cve}: {text} Which product is affected?",
)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    file, raw = load_json(path, _FILES, fix=SOURCE.where_to_get)
    listed = objects(raw.get("vulnerabilities")) if isinstance(raw, dict) else []
    if not listed:
        raise UserError(
            "not the KEV catalogue: it has no 'vulnerabilities'", where=str(file), fix=SOURCE.where_to_get
        )
    for number, item in enumerate(listed, start=1):
        cve, vendor, product, text = (
            string(item.get(key)) for key in ("cveID", "vendorProject", "product", "shortDescription")
        )
        where = f"{file}:{cve or f'vulnerability {number}'}"
        if not (cve and product and text):
            drops.add(INCOMPLETE, string(item.get("vulnerabilityName")), where=where)
            continue
        entry = Entry(f"{NAME}/{slug(vendor)}/{cve}", where, domain, LICENCE)
        named = product if product.casefold().startswith(vendor.casefold()) else f"{vendor} {product}".strip()
        text = as_sentence(" ".join(text.split()))
        question = choose(_WHAT, f"{cve}/what").format(cve=cve, product=named)
        yield from entry.records([(question, text), _second(cve, named, product, text, item)])


def _second(cve: str, named: str, product: str, text: str, item: dict[str, Any]) -> tuple[str, str] | None:
    """The kind of weakness where it is named; else the remedy, if it is to give up the product; else that."""
    if pair := kind_question(f"{cve} in {named}", text, key=cve):
        return pair
    remedy = string(item.get("requiredAction"))
    if _END_OF_LIFE.search(remedy):
        return f"{cve} in {named} is known to be exploited. What should its users do?", as_sentence(remedy)
    masked = re.sub(re.escape(product), BLANK, text, flags=re.I)
    if _NO_PRODUCT.search(product) or masked == text:
        return None
    return choose(_WHICH, f"{cve}/which").format(cve=cve, text=masked), named


SOURCE = Source(
    name=NAME,
    title="CISA Known Exploited Vulnerabilities",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository cisagov/kev-data, commit eacf03ec6637cc7be6d3d4ed50785493da5126a2: "
        "known_exploited_vulnerabilities.json"
    ),
    reader=_read,
    size="about 2,700 questions about 1,404 vulnerabilities",
)
