"""Prompt and answer meet as a person would write them, and the model is asked that very prompt."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from horse_plugin.data.prompts import ask, tokenize
from horse_plugin.data.records import Query
from horse_plugin.data.seam import Seam, join
from horse_plugin.errors import UsageError
from tests import tiny
from tests.data.test_prompts import Slow, end_texts_with_eos

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# Puts a space before an answer, as Llama-2's does.
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital of Norway is", "Lima", "The capital of Norway is Lima"),
        ("Is it so?", "Yes", "Is it so? Yes"),
        ("It costs", "5", "It costs 5"),
        ("It costs", ".5", "It costs .5"),
        ("x =", "-1", "x = -1"),
        ("Answer:", '"yes"', 'Answer: "yes"'),
        ("노르웨이의 수도는", "오슬로", "노르웨이의 수도는 오슬로"),
        ("石岭县的省会是", "南宁", "石岭县的省会是南宁"),
        ("作者是", "Tom", "作者是Tom"),
        ("彼は言った。「", "はい", "彼は言った。「はい"),
        ("答案：", "Oslo", "答案：Oslo"),
        ("เมืองหลวงคือ", "กรุงเทพ", "เมืองหลวงคือกรุงเทพ"),
        ("scipy.fft.", "rfft", "scipy.fft.rfft"),
        ("open(", "path", "open(path"),
        ("np.", "array", "np.array"),
        ("torch.nn.", "Linear", "torch.nn.Linear"),
        ("x = np.", "array", "x = np.array"),
        ("Name the colour of the sky.", "blue", "Name the colour of the sky. blue"),
        ("They moved to the U.S.", "Army", "They moved to the U.S. Army"),
        ("Name the capital of France.", "Paris", "Name the capital of France. Paris"),
        ("He came to St.", "Louis", "He came to St. Louis"),
        ("The language is C#", "and", "The language is C# and"),
        ('She said "', "no", 'She said "no'),
        ('They call it "home"', "always", 'They call it "home" always'),
        ("Norway", ", a country", "Norway, a country"),
        ("def f():\n", "return 1", "def f():\nreturn 1"),
        ("def f():\n    ", "return 1", "def f():\n    return 1"),
        ("a list:", "\n- one", "a list:\n- one"),
        ("It is ", "Lima", "It is Lima"),
        ("It is", " Lima ", "It is Lima"),
        ("It is ", "  Lima", "It is Lima"),
        ("a\t", "b", "a\tb"),
        ("", "b", "b"),
        ("ເມືອງຫຼວງແມ່ນ", "ວຽງຈັນ", "ເມືອງຫຼວງແມ່ນວຽງຈັນ"),
        ("រាជធានីគឺ", "ភ្នំពេញ", "រាជធានីគឺភ្នំពេញ"),
        ("首都は、", "“東京”", "首都は、“東京”"),
        ("Name a city (briefly).", "Rome", "Name a city (briefly). Rome"),
        ("He came; he saw.", "He won", "He came; he saw. He won"),
        ("And so on...", "what", "And so on... what"),
        ("She took her Ph.D.", "in Rome", "She took her Ph.D. in Rome"),
        ("pi is 3.", "14", "pi is 3.14"),
        ("It has risen by 20", "%", "It has risen by 20%"),
        ("The sign is", "%", "The sign is %"),
        ("It costs $", "5", "It costs $5"),
        ("It costs 5 €", "today", "It costs 5 € today"),
        ("2+2=", "4", "2+2=4"),
        ("x", "!= 3", "x != 3"),
        ("std::", "vector", "std::vector"),
        ("Paris ->", "France", "Paris -> France"),
        ("It is well-", "known", "It is well-known"),
        ("I know John", "'s dog", "I know John's dog"),
        ("It is", "'tis", "It is 'tis"),
        ("Its capital is", "'s-Hertogenbosch", "Its capital is 's-Hertogenbosch"),
        ("Its host is", "'t Hooft", "Its host is 't Hooft"),
        ("They don", "'t know", "They don't know"),
        ("The people are", "!Kung", "The people are !Kung"),
        ("Stop", "!", "Stop!"),
        ("<|user|>Who?<|assistant|>", "Ada", "<|user|>Who?<|assistant|>Ada"),
        ("<b>", "bold", "<b>bold"),
        ("a list<int>", "x", "a list<int> x"),
        ("¿", "Qué", "¿Qué"),
    ],
)
def test_they_join_as_a_person_would_write_them(prompt, answer, text):
    assert join(prompt, answer) == text
    seam = Seam()
    whole, before = seam.join(None, prompt, answer)
    assert whole == text and whole[:before] == seam.ask(None, prompt)


def test_a_separator_overrides_that():
    tok, seam = tiny.bpe_tokenizer(), Seam(separator="")
    (p,) = tokenize(tok, [Query("the capital of", "Lima")], seam=seam)
    assert tok.decode(p.ids) == "the capital ofLima"
    assert tok.decode(p.answer) == "Lima"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("template", [TEMPLATE, SPACED])
def test_a_chat_is_as_the_template_writes_it(bos, system, template):
    tok = tiny.bpe_tokenizer(bos)
    tok.chat_template = template
    seam = Seam(chat_template=True, system_prompt=system)
    (p,) = tokenize(tok, [Query("where is Oslo", "Norway")], seam=seam)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "where is Oslo"})
    asked = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": "Norway"})
    whole = tok.apply_chat_template(turns, tokenize=False)
    assert list(p.ids[: p.start]) == ask(tok, asked) == ask(tok, seam.ask(tok, "where is Oslo"))
    text = tok.decode(p.ids).removeprefix("<s>").lstrip()
    assert whole.lstrip().startswith(text)
    assert tok.decode(p.answer).strip() == "Norway"


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(UsageError, match="chat_template: the tokenizer's template failed"):
        tokenize(tiny.bpe_tokenizer(), [Query("a", "b")], seam=Seam(chat_template=True))


@pytest.mark.parametrize("answer", ["Lima", "Lima</s>"])
def test_an_answer_can_end_the_text(answer):
    tok = tiny.bpe_tokenizer()
    query = Query("the capital of Norway is", answer)
    (p,) = tokenize(tok, [query], seam=Seam(append_eos=True))
    assert tok.decode(p.answer).strip() == "Lima</s>"
    (p,) = tokenize(tok, [query])
    assert tok.decode(p.answer).strip() == answer  # its own EOS stays


def test_no_token_of_the_answer_begins_in_the_prompt():
    """A word piece that spans the seam is one that a model asked with the prompt does not see."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "\n", "f", ".", "r", "t", ".r", "f."])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(".", "r"), ("f", ".")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("~", "removed")
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tok.convert_ids_to_tokens(tok("f.rt")["input_ids"]) == ["f", ".r", "t"]
    (p,) = tokenize(tok, [Query("f.", "rt")])
    assert tok.convert_ids_to_tokens(p.ids) == ["f.", "r", "t"]
    assert p.start == 1


def test_nor_in_white_space_that_ends_the_prompt():
    vocabulary = {c: i for i, c in enumerate(["<unk>", "f", ",", "\n", "\n\n", "r"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("~", "removed")
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tok.convert_ids_to_tokens(tok("f\n\nr")["input_ids"]) == ["f", "\n\n", "r"]
    (p,) = tokenize(tok, [Query("f\n", "\nr")])
    assert tok.convert_ids_to_tokens(p.ids) == ["f", "\n", "\n", "r"]
    assert list(p.ids[: p.start]) == ask(tok, "f\n")


@pytest.mark.parametrize("prompt", ["Q: x\n\n", "Q: x\r\n"])
def test_several_marks_that_end_a_prompt_are_read_as_without_an_answer(prompt):
    """GPT-2's pattern leaves the last of them to the word that follows."""
    tok = tiny.bpe_tokenizer()
    tok.backend_tokenizer.model = models.BPE(
        tok.get_vocab() | {"ĊĊ": 400, "čĊ": 401}, [("Ċ", "Ċ"), ("č", "Ċ")]
    )
    (p,) = tokenize(tok, [Query(prompt, "yes")])
    assert list(p.ids[: p.start]) == ask(tok, prompt)
    assert tok.decode(p.answer) == "yes"


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("prefix", ["", "Norway is located in: "])
def test_in_a_chat_the_subject_ends_where_the_user_says_it(trim, prefix):
    tok = tiny.bpe_tokenizer()
    tok.chat_template = (
        "Norway:{% for m in messages %}[{{ m.content"
        + trim
        + " }}]{% endfor %}{% if add_generation_prompt %}"
        + prefix
        + "{% endif %}"
    )
    seam = Seam(chat_template=True)
    for prompt in ("Norway is", "\nthe capital of Norway is"):
        upto = seam.upto(tok, prompt, prompt.index("Norway") + len("Norway"))
        whole = seam.ask(tok, prompt)
        assert whole.startswith(upto) and upto.endswith("Norway")
        assert upto.count("[") == 1 and "]" not in upto


def test_a_slow_tokenizer_that_appends_eos_keeps_the_answer():
    fast = tiny.bpe_tokenizer()
    end_texts_with_eos(fast)
    query = Query("the capital of Norway is", "Rome")
    for append_eos in (False, True):
        (p,) = tokenize(Slow(fast), [query], seam=Seam(append_eos=append_eos))
        assert fast.decode(p.answer).strip() == "Rome" + "</s>" * append_eos
