"""The catalogue of sources."""

import json

import pytest

from qwen_ray.data.sources import SOURCES, Drops, get_source
from qwen_ray.errors import UserError


def test_file_source_reads_any_format_and_counts_what_is_empty(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps([{"instruction": "Name a planet.", "output": "Mars."}, {"instruction": "x", "output": ""}])
    )
    drops = Drops()
    (record,) = get_source("file").read(path, drops=drops)
    assert (record.domain, record.source) == ("general", "mine")
    assert drops.counts.total() == 1
    assert drops.log[0].where.startswith(str(path))


def test_catalogue_names_every_source_and_where_to_get_it():
    assert {"openstax_biology", "openstax_us_history", "openstax_world_history", "gsm8k", "file"} <= set(
        SOURCES
    )
    assert all(name == s.name and s.title and s.licence and s.where_to_get for name, s in SOURCES.items())


def test_unknown_source_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'openstax_biology'"):
        get_source("openstax_biolgy")
