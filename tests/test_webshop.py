"""WebShop as text: pages, search, reward, goals, and what is refused. No network, no data.

python -m pytest tests/test_webshop.py          (seconds)
"""

import doctest
import importlib
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest

from envs import make
from worlds.webshop import synthetic
from worlds.webshop.catalogue import Goal, Product, draw_limit
from worlds.webshop.env import fitting_value
from worlds.webshop.reward import has_attribute, has_option, reward, type_factor
from worlds.webshop.search import Index, terms

SHOE = {
    "asin": "B00000SHOE",
    "name": "Swift Women's Running Shoes [New]",
    "full_description": "Light and soft.",
    "small_description": ["Machine Washable", "Rubber sole"],
    "pricing": "$19.99",
    "product_category": "Clothing › Shoes › Running",
    "query": "Running Shoes ",
    "customization_options": {
        "Width": None,
        "Color": [{"value": "Black/White"}, {"value": "Dark Blue"}],
        "Size": [{"value": " 7  Wide "}],
    },
}
BOOT = SHOE | {
    "asin": "B00000BOOT",
    "name": "Rock Shoes",
    "full_description": "",
    "small_description": "Machine washable",
    "pricing": "$60.00$1,090.00",
    "customization_options": "",
}
TEA = BOOT | {
    "asin": "B000000TEA",
    "name": "Green Tea",
    "pricing": "",
    "product_category": "Grocery › Tea",
    "query": "tea",
}
ITEMS = [SHOE, BOOT, TEA, TEA | {"name": "again"}, TEA | {"asin": "nan"}]
WANTED = {
    "instruction": "Find me shoes",
    "instruction_attributes": ["machine washable", "non slip"],
}
NOTES = {"B00000SHOE": WANTED | {"attributes": ["non-slip"]}, "B00000BOOT": {"attributes": []}}
WISH = {
    "instruction": "i want blue shoes.",
    "instruction_attributes": ["non slip"],
    "instruction_options": ["dark  blue"],
}
HUMAN = {"B00000SHOE": [WISH | {"instruction_attributes": []}, WISH]}
FILES = {
    "items_shuffle_1000.json": ITEMS,
    "items_ins_v2_1000.json": NOTES,
    "items_human_ins.json": HUMAN,
}


def write(folder, **changed):
    """A data folder; of the changed files the text as it is, or none."""
    for name, content in FILES.items():
        content = changed.get(name.split("_")[1], content)
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture
def env(tmp_path):
    """A shop of three products, in an episode whose goal is the dark blue shoe."""
    env = make("webshop", data=write(tmp_path), step_limit=1000)
    number = next(n for n, goal in enumerate(env.shop.goals) if "dark blue" in goal.text)
    env.reset("webshop", number)
    return env


def test_pages(env):
    """Every page as WebShop's text mode shows it. Parts after an empty text close up."""
    text = env.goal.text
    head = f"Instruction: [SEP] {text} [SEP] Back to Search [SEP] "
    item = (
        f"{head}< Prev [SEP] color [SEP] black | white [SEP] dark blue [SEP] size [SEP] 7  wide "
        "[SEP] Swift Women's Running Shoes [New] [SEP] Price: $19.99 [SEP] Rating: N.A. "
        "[SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    boot = (
        f"{head}< Prev [SEP] Rock Shoes [SEP] Price: $60.0 to $1090.0 [SEP] Rating: N.A. "
        "[SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    shoe = "[SEP] B00000SHOE [SEP] Swift Women's Running Shoes [New] [SEP] $19.99 "
    page_1 = (
        f"{head}Page 1 (Total results: 2) [SEP] Next > {shoe}"
        "[SEP] B00000BOOT [SEP] Rock Shoes [SEP] $60.0 to $1090.0"
    )
    page_2 = f"{head}Page 2 (Total results: 2) [SEP] < Prev [SEP] Next >"
    start = f"WebShop [SEP] Instruction: [SEP] {text} [SEP] Search"
    for action, page in [
        ("click[search]", start),
        ("search[wash the boot, running shoe]", page_1),
        ("click[NEXT >]", page_2),
        ("click[< prev]", page_1),
        ("click[buy now]", page_1),
        ("click[b00000shoe]", item),
        ("click[dark blue]", item),
        ("click[description]", f"{head}< Prev [SEP] Light and soft."),
        ("click[< prev]", item),
        ("click[features]", f"{head}< Prev [SEP] Machine Washable [SEP] Rubber sole"),
        ("click[< prev]", item),
        ("click[reviews]", f"{head}< Prev"),
        ("search[zebra]", f"{head}Page 1 (Total results: 0) [SEP] Next >"),
        ("click[back to search]", start),
        ("search[rock]", page_1.replace(": 2", ": 1").replace(shoe, "")),
        ("click[b00000boot]", boot),
        ("click[description]", f"{head}< Prev"),
        ("search[ ]", f"{head}Page 1 (Total results: 0) [SEP] Next >"),
    ]:
        observation, reward, terminated, _, _ = env.step(action)
        assert (observation, reward, terminated) == (page, 0, False), action
    search = f"search[{' '.join(text.split())}]"
    assert env.valid_actions() == ["click[back to search]", "click[next >]", search]


CHOICES = ["click[dark blue]", "click[7 wide]"]


def test_a_state_is_more_than_what_its_page_shows(env):
    """What is chosen, in any order, and whose page it is; but not how one came there."""

    def state(*actions):
        env.reset("webshop", env.variation)
        for action in ["search[shoe]", *actions]:
            seen = env.step(action)[0]
        return seen, env.anchor()

    shoe, boot, reviews = "click[b00000shoe]", "click[b00000boot]", "click[reviews]"
    for one, other in [
        ((shoe,), (shoe, CHOICES[0])),
        ((shoe, CHOICES[0]), (shoe, *CHOICES)),
        ((shoe, reviews), (boot, reviews)),
        ((boot, reviews), (boot, "click[description]")),
    ]:
        (seen, first), (seen_too, second) = state(*one), state(*other)
        assert seen == seen_too and first != second
    assert state(shoe, *CHOICES) == state(boot, "click[< prev]", shoe, *CHOICES[::-1])
    assert state() == state(shoe, CHOICES[0], "click[< prev]") == state("click[no such button]")


@pytest.mark.parametrize(
    ("actions", "score"),
    [
        (CHOICES, 100),
        (["click[black | white]", *CHOICES], 100),  # the later choice counts
        ([*CHOICES, "click[black | white]"], 80),
        (CHOICES[:1], 80),
        (["click[features]", "click[dark blue]", "click[< prev]", *CHOICES[1:]], 80),
        ([*CHOICES, "click[features]", "click[< prev]"], 100),
        ([*CHOICES, "click[< prev]", "click[b00000shoe]"], 60),  # choices are forgotten
        ([*CHOICES, "search[shoe]", "click[b00000shoe]"], 60),
        (["search[rock]", "click[b00000boot]"], 20),  # washable; not non-slip, no options, too dear
        (["search[green tea]", "click[b000000tea]"], 0),  # no word of the title
    ],
)
def test_what_a_purchase_scores(env, actions, score):
    """The goal has two attributes, two options and a price limit: five wishes."""
    for action in ["search[shoes]", "click[b00000shoe]", *actions]:
        env.step(action)
    observation, reward, terminated, _, info = env.step("click[buy now]")
    assert (terminated, reward, info["score"]) == (True, score, score)
    thanks = "Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP]"
    assert observation == f"{thanks} {score / 100}"


def test_goals_of_the_files(env, tmp_path):
    """One for every combination of options, the price limit one of the next four tens."""
    goals = {goal.text: goal for goal in env.shop.goals}
    limit = env.goal.price_limit
    assert limit in (30, 40, 50)
    assert sorted(goals) == [
        f"Find me shoes with color: {color}, and size: 7  wide, and price lower than {limit:.2f} "
        "dollars"
        for color in ("black | white", "dark blue")
    ]
    assert env.goal.options == [("color", "dark blue"), ("size", "7  wide")]
    asins = [product.asin for product in env.shop.products]
    assert asins == ["B000000TEA", "B00000BOOT", "B00000SHOE"]
    tea, boot, shoe = env.shop.products
    assert (tea.price, tea.price_tag, tea.attributes) == (100, "$100.0", ["DUMMY_ATTR"])
    assert 60 < boot.price < 1090
    assert shoe.query == boot.query == "running shoes"
    assert shoe.search_text() == (
        "swift women's running shoes [new] light and soft. machine washable "
        "color: black | white, dark blue, and size: 7  wide"
    )
    assert env.VERSION == "webshop, 3 products, 2 synthetic goals"
    assert env.gold_path()[-3:] == ["click[dark blue]", "click[7 wide]", "click[buy now]"]
    human = make("webshop", data=str(tmp_path), goals="human")
    human.reset("webshop", 0)
    assert human.goal.text.startswith("i want blue shoes, and price lower than ")
    for action in human.gold_path():
        score = human.step(action)[4]["score"]
    assert (len(human.shop.goals), score) == (1, 100)


def test_gold_path_where_the_title_does_not_find_the_product(tmp_path):
    """55 products have its title and less text."""
    twins = [SHOE | {"asin": f"twin {number}", "full_description": ""} for number in range(55)]
    env = make("webshop", data=write(tmp_path, shuffle=[SHOE, *twins]))
    env.reset("webshop", 0)
    assert [env.step(action)[4]["score"] for action in env.gold_path()][-1] == 100


def test_price_limits():
    """Of the next four multiples of ten two are drawn, and the larger counts. None above 990."""

    def drawn(price):
        return {draw_limit(product(price=price), str(number)) for number in range(60)}

    text = ", and price lower than 50.00 dollars"
    assert sorted(drawn(19.99))[-1] == (50, text)
    assert {limit for limit, _ in drawn(20)} == {40, 50, 60}
    assert {limit for limit, _ in drawn(970)} == {990}
    assert drawn(980) == {(1_000_000, "")}


def test_bm25_by_hand():
    """N = 3, mean length 2. "red": ln(1 + 1.5 / 2.5) = 0.4700 times 1 / (1 + 0.9 · 1) in text 0,
    times 2 / (2 + 0.9 · (0.6 + 0.4 · 1.5)) in text 1. "hats": ln(1 + 2.5 / 1.5) = 0.9808."""
    index = Index(["the Red shoe", "red's red hat", "blue"])
    assert index.scores("red").tolist() == pytest.approx([0.24737, 0.30520, 0], abs=1e-5)
    assert index.scores("red RED").tolist() == pytest.approx([0.49474, 0.61039, 0], abs=1e-5)
    hat = 0.98083 / (1 + 0.9 * (0.6 + 0.4 * 1.5))
    assert index.scores("red hats")[1] == pytest.approx(0.30520 + hat, abs=1e-5)
    assert index.search("red", 50) == [1, 0]
    assert index.search("a zebra", 50) == []
    long = Index(["tea" + 42 * " x", "tea" + 41 * " y"])  # 43 and 42 words count as 42
    assert long.scores("tea").tolist() == pytest.approx([0.09617] * 2, abs=1e-5)
    same = Index(["green tea", *["tea"] * 40])
    assert same.search("tea", 50) == [*range(1, 41), 0]
    assert same.search("tea", 20) == [*range(1, 21)]
    assert Index(["", "the"]).search("the", 50) == []


def test_words():
    """A word is what Lucene's standard tokenizer says; the stems are Porter's and Lucene's."""
    text = (
        "It's for the dogs’s U.S.A. 2.5-inch caresses, ponies: 1,000 note:this possibly relational"
    )
    stems = ["it", "dog", "u.s.a", "2.5", "inch", "caress", "poni", "1,000", "note:thi", "possibl"]
    assert terms(text) == [*stems[1:], "relat"]
    assert terms("x" * 10_000) == ["x" * 255]


def product(title="", query="q", shelf="A › B", **other):
    blank = {"asin": "", "description": "", "bullets": [], "price": 1.0, "price_tag": ""}
    blank |= {"options": {}, "attributes": []}
    return Product(title=title, query=query, product_category=shelf, **(blank | other))


TEN = "One, two and three four five six seven eight nine ten 11"


@pytest.mark.parametrize(
    ("title", "query", "shelf", "factor"),
    [
        ("one of the three, and five! Red blue grey pink gold teal", "x", "X", 1),  # 3 of 10 words
        ("one three", "x", "X", 0.5),  # 2 of 10 are not more than a fifth
        ("one three and 11", "x", "B › A › C", 1),
        ("one three", "x", "A › A › C", 0.5),
        ("one", "q", "X", 1),  # 1 of 10 is enough if the query says the same
        ("eleven", "q", "A › B", 0),
    ],
)
def test_type_factor(title, query, shelf, factor):
    assert type_factor(product(title, query, shelf), product(TEN)) == factor


def test_type_factor_of_short_and_long_titles():
    assert type_factor(product("one"), product(TEN + " twelve")) == 0.1
    assert type_factor(product("one"), product("1 2 the")) == 1


def test_attributes_and_options():
    """Words count, not their order or case; in texts only the very words; colours by name."""
    tea = product("Herbal Infusion", bullets=["Tastes like", "lemon balm"], attributes=["tea tree"])
    assert has_attribute(tea, "Tree of TEA")
    assert has_attribute(tea, "tea trees")
    assert has_attribute(tea, "like lemon")
    assert not has_attribute(tea, "balm lemon")
    assert not has_attribute(tea, "organic")
    assert has_attribute(product(description="Of OAK wood"), "oak wood")
    for value, option, same in [
        ("navy blue", "sky blue", True),
        ("navy blue", ("color", "sky blue"), True),
        ("sky blue", ("color", "blue"), True),
        ("sky", ("color", "blue"), False),
        ("8 ounce (pack of 2)", ("size", "8 ounce (pack of 2)"), True),
        ("herbal tea", "herbal bag", False),
        ("a" * 23 + "bbbb", "a" * 23 + "cccc", False),  # 46 of 54 letters: 85 percent
        # Two surprises that WebShop has, too: six of seven letters are the same, and "tan".
        ("8 ounce", "9 ounce", True),
        ("standard", ("style", "standard"), False),
    ]:
        assert has_option(["-", value], option) is same, (value, option)


def test_the_value_that_a_goal_means():
    shoe = product(options={"color": ["sky blue", "navy blue"], "size": ["8 ounce"]})
    for option in ("navy blue", ("color", "navy blue")):
        assert fitting_value(shoe, option) == "navy blue"
    assert fitting_value(shoe, "dark blue") == "sky blue"
    assert fitting_value(shoe, "linen") is None


def test_reward_counts_wishes():
    """4 of 5: an attribute is missing. Exactly the limit is not too dear."""
    own = product(TEN, attributes=["soft"], price=20.0)
    goal = Goal(own, "", ["soft", "warm"], ["xl", ("color", "red")], 20.0)
    assert reward(own, ["red", "XL"], goal) == 4 / 5
    assert reward(own, ["red", "XL"], Goal(own, "", ["soft"], [], 19.99)) == 1 / 2
    other = product("one three", "x", "X", price=20.0)
    assert math.isclose(reward(other, ["red", "xl"], goal), 0.5 * 3 / 5)


@pytest.mark.parametrize(
    ("goals", "test", "dev"), [(12_087, 500, 1000), (10_000, 500, 1000), (6910, 500, 0), (13, 3, 0)]
)
def test_splits(goals, test, dev):
    env = make("webshop")
    env.shop = SimpleNamespace(goals=range(goals))
    parts = [env.variations("webshop", split) for split in ("test", "dev", "train")]
    assert [len(part) for part in parts] == [test, dev, goals - test - dev]
    assert [*parts[0], *parts[1], *parts[2]] == list(range(goals))


@pytest.mark.parametrize("module", ["env", "reward", "search"])
def test_the_examples_in_docstrings_are_true(module):
    result = doctest.testmod(importlib.import_module(f"worlds.webshop.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_synthetic_catalogue():
    """Said wherever it is recorded or read; always the same; every goal can be reached."""
    env = make("webshop")
    assert env.shop is make("webshop", data="").shop
    assert env.VERSION == "webshop, synthetic catalogue"
    _, info = env.reset("webshop", 0)
    assert "synthetic catalogue" in info["prompt"]
    assert env.goal.text.startswith("Buy wool socks: quick drying, slim fit with color: purple")
    assert (len(env.shop.products), len(env.shop.goals)) == (1000, 2324)
    for number in range(0, len(env.shop.goals), 10):
        env.reset("webshop", number)
        steps = [env.step(action) for action in env.gold_path()]
        assert [step[1:4] for step in steps[:-1]] == [(0, False, False)] * (len(steps) - 1)
        assert steps[-1][1:4] == (100, True, False)
        if env.goal.options:  # the right product alone is not enough
            env.reset("webshop", number)
            search, click, *_, buy = env.gold_path()
            assert [env.step(action) for action in (search, click, buy)][-1][1] < 100


def test_fifty_hits_ten_a_page():
    env = make("webshop", step_limit=100)
    env.reset("webshop", 0)
    pages = [env.step("search[pro]")[0]]
    pages += [env.step("click[next >]")[0] for _ in range(5)]
    assert [page.count("[SEP] B0") for page in pages] == [10, 10, 10, 10, 10, 0]
    assert all(f"Page {n} (Total results: 50)" in page for n, page in enumerate(pages, 1))


def test_the_values_of_a_synthetic_option_are_told_apart():
    for _, _, _, options in synthetic.CATEGORIES:
        for name, values in options.items():
            for value, other in itertools.permutations(values, 2):
                assert not has_option([value], (name, other))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shuffle": None}, "no items_shuffle.json and no items_shuffle_1000.json there"),
        ({"ins": None}, "items_ins_v2_1000.json cannot be read"),
        ({"human": None}, "items_human_ins.json cannot be read"),
        ({"shuffle": "[{"}, "items_shuffle_1000.json cannot be read"),
        ({"shuffle": NOTES}, "a list should be in it"),
        ({"ins": ITEMS}, "a dict should be in it"),
        ({"shuffle": [{"id": 1}]}, "schema"),
        ({"shuffle": ["shoe"]}, "schema"),
        ({"shuffle": [SHOE | {"pricing": "$cheap"}]}, "schema"),
        ({"shuffle": [SHOE | {"customization_options": ["red"]}]}, "schema"),
        ({"shuffle": [SHOE | {"name": None}]}, "a text of B00000SHOE is missing"),
        ({"human": {"B00000SHOE": ["shoes"]}}, "schema"),
        ({"human": {"B00000SHOE": [WISH | {"instruction_options": None}]}}, "None is no list"),
        ({"human": {"B00000SHOE": [WISH | {"instruction_attributes": "soft"}]}}, "'soft' is no"),
        ({"ins": {"B00000SHOE": {"attributes": [1]}}}, "no list of texts"),
        ({"ins": {"B00000SHOE": WANTED | {"instruction_attributes": None}}}, "None is no list"),
        ({"shuffle": 100_000 * "["}, "items_shuffle_1000.json cannot be read"),
        ({"shuffle": []}, "0 products and no human goal"),
        ({"human": {}}, "3 products and no human goal"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, changed, message):
    goals = "synthetic" if "ins" in changed else "human"
    with pytest.raises(ValueError, match=message) as error:
        make("webshop", data=write(tmp_path, **changed), goals=goals)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "data=nowhere"),
        ({"data": 1000}, "data=1000"),
        ({"goals": "humane"}, "did you mean human"),
        ({"goals": "human"}, "add data=FOLDER"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("webshop", **options)


def test_what_counts_as_the_action(env):
    """What is in the last <action>, without the reasoning. The rest does nothing."""
    _, info = env.reset("webshop", env.variation)
    assert info["prompt"].endswith("<think>your reasoning</think><action>your action</action>.")
    start = env.step("")[0]
    results = env.step("search[shoe]")[0]
    odd = ["click[b00000shoe", "B00000SHOE", "Click[b00000shoe]", "click [b00000shoe]", "click[]"]
    odd += ["I click[b00000shoe]", "click[x[b00000shoe]]", "search[]", "[a]", "]a["]
    for action in odd:
        assert env.step(action)[0] == results, action
    answer = "<think>Not <action>click[next >]</action>.</think> <action> search[shoe] </action>."
    observation, *_, info = env.step(answer)
    assert (observation, info["action"]) == (results, "search[shoe]")
    assert env.step("<action>click[back to search]")[0] == start
    assert env.step("search[shoe] please")[0] == results


def test_thousands_of_odd_actions():
    """Brackets, tags, other scripts, half characters, very long: none breaks, most do nothing."""
    env = make("webshop", step_limit=10**9)
    env.reset("webshop", 7)
    draw = random.Random(0)
    parts = ["search", "click", "[", "]", "[[", "next >", "< prev", "back to search", "<r>", "<a>"]
    parts += ["<action>", "</action>", "<think>", "\ud800", "\u706b", "é’s", "\x00", "\n", " ", "'"]
    for number in range(3_000):
        action = "".join(draw.choices(parts, k=draw.randint(0, 8)))
        if number % 100 == 0:
            action = f"search[{action * 300}]"
        elif number % 3 == 0:
            action = draw.choice(env.valid_actions()).replace("click[buy now]", action)
        observation, score, over, _, _ = env.step(action)
        assert "[SEP]" in observation
        assert (score, over) == (0, False)
    assert env.steps == 3_000
