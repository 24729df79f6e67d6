"""Questions made for these tests, each in four other wordings, ever further from it."""

from __future__ import annotations

from typing import NamedTuple


class Copied(NamedTuple):
    """A multiple-choice question, the right choice first."""

    question: str
    choices: tuple[str, str, str, str]
    surface: str
    """Case, punctuation, spelling and number words changed."""
    reworded: str
    """Clauses moved, endings changed, few words come or go."""
    rephrased: str
    """Some words replaced by others of the same meaning."""
    rewritten: str
    """Said in other words altogether."""


COPIED = [
    Copied(
        "Which of the following structures in a plant cell captures light energy and converts it "
        "into chemical energy?",
        ("chloroplast", "mitochondrion", "central vacuole", "ribosome"),
        "WHICH OF THE FOLLOWING STRUCTURES IN A PLANT CELL CAPTURES LIGHT ENERGY, AND CONVERTS IT "
        "INTO CHEMICAL-ENERGY",
        "Light energy is captured and converted into chemical energy by which structure of plant cells?",
        "In the cells of plants, what structure takes in the energy of light and turns it into "
        "chemical energy?",
        "Where inside green plants does the sun's power become stored as sugar fuel?",
    ),
    Copied(
        "A population of field mice is split by a new river, and after many generations the two "
        "groups can no longer interbreed. This is an example of",
        ("allopatric speciation", "sympatric speciation", "convergent evolution", "genetic drift"),
        "a populaton of field mice is split by a new river and after many generations the 2 groups "
        "can no longer interbreed; this is an exmaple of...",
        "After a new river splits a population of field mice, the two groups can no longer "
        "interbreed many generations later. Of what is this an example?",
        "A river newly divides a field mouse population. Many generations on, mice of the two "
        "groups cannot interbreed. What is this called?",
        "Mice cut off from one another by a stream eventually become different species. Name the process.",
    ),
    Copied(
        "During which phase of mitosis do the sister chromatids separate and move toward opposite "
        "poles of the spindle?",
        ("anaphase", "prophase", "telophase", "metaphase"),
        "During which phase of mitosis do the sister-chromatids seperate and move towards opposite "
        "poles of the spindle",
        "Sister chromatids separate and move to opposite spindle poles in which phase of mitosis?",
        "At what stage of mitosis are sister chromatids pulled apart to the opposite poles of the spindle?",
        "When a nucleus divides, at what point do the duplicate DNA strands get pulled to either end?",
    ),
    Copied(
        "Two parents who are both carriers of a recessive disorder have four children. What is the "
        "probability that their first child is affected?",
        ("one quarter", "one half", "three quarters", "zero"),
        "Two parents, who are both carriers of a recessive disorder, have 4 children. What is the "
        "probability that their first child is affected ?",
        "What is the probability that the first child is affected, if both of the parents, who have"
        " four children, are carriers of a recessive disorder?",
        "Both parents carry a recessive disorder and they have four children. How likely is it that"
        " the first child is affected?",
        "Mum and dad each have one copy of a faulty gene; what are the odds that their eldest is ill?",
    ),
    Copied(
        "What happens to a red blood cell that is placed in a strongly hypotonic solution?",
        (
            "It takes up water and bursts.",
            "It loses water and shrinks.",
            "It divides.",
            "Nothing happens to it.",
        ),
        "what happens to a red blood cell, that is placed in a strongly hypotonic solution",
        "If a red blood cell is placed in a solution that is strongly hypotonic, what happens to it?",
        "What becomes of a red blood cell put into a highly hypotonic solution?",
        "If you drop an erythrocyte in distilled water, what will you see?",
    ),
    Copied(
        "Which article of the peace settlement of 1919 placed the responsibility for the war upon "
        "Germany and its allies?",
        ("Article 231", "Article 10", "Article 88", "Article 5"),
        "Which Article of the Peace Settlement of 1919 placed the responsability for the War upon "
        "Germany & its allies?",
        "Responsibility for the war was placed upon Germany and its allies by which article of the "
        "1919 peace settlement?",
        "In the 1919 peace settlement, what article made Germany and its allies responsible for the war?",
        "Which clause of the Versailles treaty blamed Berlin for starting hostilities?",
    ),
    Copied(
        "Why did many farmers of the Great Plains join the Populist movement in the 1890s?",
        (
            "falling crop prices and high railroad rates",
            "rising wages in the cities",
            "the end of immigration",
            "a ban on silver mining",
        ),
        "why did many farmers of the great plains join the populist movement, in the 1890's?",
        "In the 1890s the Populist movement was joined by many farmers of the Great Plains. Why?",
        "What led so many Great Plains farmers to enter the Populist movement during the 1890s?",
        "What grievances pushed prairie growers toward the People's Party late in the nineteenth century?",
    ),
    Copied(
        "The construction of the transcontinental railroad in the United States relied most heavily"
        " on the labor of immigrants from which two countries?",
        ("China and Ireland", "Italy and Greece", "Japan and Norway", "Mexico and Cuba"),
        "The construction of the transcontinental rail-road in the United States relied most "
        "heavily on the labor of immigrants from which 2 countries",
        "Immigrants from which two countries did most of the labor on which the construction of the"
        " United States' transcontinental railroad relied?",
        "Workers who had immigrated from which two countries mostly built the transcontinental "
        "railroad of the United States?",
        "Who, by origin, supplied the bulk of the manpower that laid the rails linking America's coasts?",
    ),
    Copied(
        "Which Roman emperor legalized the practice of Christianity with the Edict of Milan?",
        ("Constantine", "Nero", "Hadrian", "Trajan"),
        "which roman emperor legalised the practise of christianity with the edict of milan",
        "With the Edict of Milan, the practice of Christianity was legalized by which emperor of Rome?",
        "Who was the Roman emperor whose Edict of Milan made it legal to practice Christianity?",
        "Under which ruler did Rome first tolerate the followers of Jesus?",
    ),
    Copied(
        "What was the main purpose of the tribute system that Ming China maintained with its neighbors?",
        (
            "to affirm the supremacy of the emperor",
            "to collect taxes for war",
            "to spread Buddhism",
            "to recruit sailors",
        ),
        "What was the main purpose of the tribute-system, that Ming China maintained with its neighbours?",
        "Ming China maintained a tribute system with its neighbors: what was its main purpose?",
        "What was the chief aim of Ming China's system of tribute with neighboring states?",
        "What did Beijing hope to gain from the gifts that foreign envoys brought to the court before 1644?",
    ),
    Copied(
        "An attacker sends a request in which a user-supplied string is executed as part of a "
        "database query. Which kind of vulnerability is being exploited?",
        ("SQL injection", "cross-site scripting", "buffer overflow", "clickjacking"),
        "An atacker sends a request in which a user supplied string is executed as part of a data-"
        "base query. which kind of vulnerability is being exploited",
        "Which kind of vulnerability is exploited when an attacker's request makes a user-supplied "
        "string execute as part of a database query?",
        "A string supplied by the user in an attacker's request gets run as a piece of a database "
        "query. What vulnerability does this exploit?",
        "Text typed into a form ends up altering a SELECT command. What flaw is this?",
    ),
    Copied(
        "Which property of a cryptographic hash function makes it infeasible to find two different "
        "inputs with the same digest?",
        ("collision resistance", "preimage resistance", "determinism", "the avalanche effect"),
        "Which property of a cryptographic hash-function makes it infeasible to find 2 different "
        "inputs with the same digest?",
        "It is infeasible to find two different inputs of a cryptographic hash function with the "
        "same digest because of which property?",
        "What property of cryptographic hash functions means that two inputs which differ but share"
        " a digest cannot feasibly be found?",
        "What do we call a digest's guarantee that no pair of messages share one value?",
    ),
    Copied(
        "What is the primary purpose of storing passwords with a unique random salt for every user?",
        (
            "to defeat precomputed tables",
            "to make passwords shorter",
            "to speed up the login",
            "to allow recovery by e-mail",
        ),
        "What is the primary purpose of storing passwords with a unique, random salt for every user",
        "Passwords are stored with a random salt that is unique for every user. What is the primary purpose?",
        "Why should a password be stored together with a random salt unique to each user?",
        "Why add random bytes before digesting login secrets?",
    ),
    Copied(
        "A bakery sells muffins in boxes of 6. If Lena buys 7 boxes and eats 5 muffins, how many "
        "muffins are left?",
        ("37", "42", "35", "47"),
        "A bakery sells muffins in boxes of six. If Lena buys seven boxes and eats five muffins, "
        "how many muffins are left?",
        "Lena buys 7 boxes of muffins at a bakery that sells them in boxes of 6. How many muffins "
        "are left if she eats 5?",
        "Muffins come in boxes of 6 at the bakery. Lena purchases 7 boxes and eats 5 of the "
        "muffins. How many remain?",
        "Seven half-dozen packs of cakes are bought, five cakes get eaten; what is the remainder?",
    ),
    Copied(
        "According to the social contract theory of Thomas Hobbes, people leave the state of nature"
        " chiefly because they",
        ("fear a violent death", "wish to own land", "seek salvation", "love their neighbors"),
        "According to the social-contract theory of thomas hobbes, people leave the state of nature"
        " cheifly because they:",
        "In Thomas Hobbes's theory of the social contract, why, chiefly, do people leave the state "
        "of nature?",
        "What does Hobbes's social contract theory give as the main reason for people to leave the "
        "state of nature?",
        "Why, for the author of Leviathan, do humans accept a sovereign?",
    ),
    Copied(
        "Which of the following best explains why the biodiversity of an isolated island is lower "
        "than that of the mainland?",
        (
            "Fewer species reach the island than die out there.",
            "Islands are always colder.",
            "Islands have no predators.",
            "Island soil lacks water.",
        ),
        "Which of the following best explains why the bio-diversity of an isolated island, is lower"
        " than that of the mainland?",
        "The biodiversity of the mainland is higher than that of an isolated island. Which of the "
        "following best explains why?",
        "Why do isolated islands have lower biodiversity than the mainland?",
        "Why do remote islets host fewer kinds of animals and plants?",
    ),
]
