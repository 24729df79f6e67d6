"""Which questions of a broad source belong to a domain: by their category, and by words."""

from __future__ import annotations

import re


def _pattern(listed: str) -> re.Pattern[str]:
    """Any of the words; ``*`` stands for any ending, ``_`` for a space."""
    words = "|".join(re.escape(word).replace("_", r"\s") for word in listed.split())
    return re.compile(rf"\b(?:{words})\b".replace(r"\*", r"\w*"), re.I)


_ENTERTAINMENT = _pattern("""
    film films filmed movie* television TV sitcom* cartoon* actor* actress* singer* song songs album* lyrics
    band bands pop_music pop_star rock_group rock_star hip-hop rap Broadway musical* soap_opera Disney Oscar
    Oscars Academy_Award* Grammy* Emmy* box_office Hollywood Olympic* Olympiad World_Cup Super_Bowl baseball
    football soccer basketball hockey tennis golf boxing boxer NBA NFL NHL MLB sport* novel novels comic
    comics superhero* video_game* computer_game* toy toys Pokemon mascot* fictional character_in fairy_tale*
    nursery crossword logo brand slang starred starring episode*
""")
_BIOLOGY = _pattern("""
    biolog* anatom* physiolog* zoolog* botan* ecolog* ecosystem* evolution* natural_selection species genus
    genera taxonom* phylum phyla organism* microb* bacteri* virus* viral fungus fungi fungal alga* yeast*
    parasit* flower* plant leaf leaves root roots seed seeds tree trees photosynth* chloro* pollin* cell
    cells cellular nucleus nucleic mitosis meiosis mitochond* membrane* cytoplasm* chromosom* gene genes
    genetic* genom* DNA RNA protein* enzym* hormon* amino_acid* vitamin* metabol* digest* respirat* lung
    lungs heart hearts cardi* blood arter* vein* kidney* renal liver hepat* stomach intestin* bowel*
    pancrea* insulin gland* thyroid organ organs tissue* muscle* bone bones skelet* spine spinal vertebra*
    skull* joint joints cartilage* tendon* brain* cerebr* cerebell* neuron* nerve* nervous synap* eye eyes
    eyelid* retina cornea ear ears tongue taste_bud* skin hair_follicle* tooth teeth human_body body_part*
    embryo* fetus foetus pregnan* uterus uterine ovar* placenta sperm* egg_cell* reproduc* immun* antibod*
    vaccin* infect* disease* diabetes cancer* tumor* tumour* leukemi* syndrome* malaria tubercul* cholera
    influenza antibiotic* animal animals mammal* reptil* amphib* insect* primate* homo_sapiens hominid*
    fossil* dinosaur* extinct* habitat* predator* food_chain* biosphere biomass hibernat* molecular
    carbohydrate* glucose cholesterol
""")
_CATEGORIES: dict[tuple[str, str], dict[str, re.Pattern[str] | None]] = {
    ("biology", "opentriviaqa"): {"animals": None, "science-technology": _BIOLOGY},
    ("history", "opentriviaqa"): {"history": None},
}
"""(domain, source) to its categories that belong to the domain, and what an item of one must name."""


def belongs(domain: str, source: str, category: str, question: str, answer: str) -> bool:
    """Whether a question counts for ``domain``. All questions of a source that is not listed here do."""
    categories = _CATEGORIES.get((domain, source))
    if categories is None:
        return True
    text = f"{question} {answer}"
    if category not in categories or _ENTERTAINMENT.search(text):
        return False
    words = categories[category]
    return words is None or words.search(text) is not None
