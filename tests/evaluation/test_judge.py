"""A judge behind a URL: a stand-in on loopback grades, and each question is asked once."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from horse_plugin import HorseError, UsageError
from horse_plugin.cli import main as cli
from horse_plugin.evaluation.judge import KEY, Judge
from horse_plugin.evaluation.written import Written, figures, table
from tests import tiny


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, reply, *headers = self.server.say(body)
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.encode())


def grade(body):
    """A where the answer to grade holds the right answer."""
    lines = body["messages"][0]["content"].splitlines()
    right = next(x for x in lines if x.startswith("Right answer: ")).partition(": ")[2]
    given = next(x for x in lines if x.startswith("Answer to grade: "))
    answer = given.partition(": ")[2]
    is_right = any(r in answer for r in right.split(", or as well: "))
    return said("A." if is_right else "B")


def said(answer):
    return 200, json.dumps({"choices": [{"message": {"content": answer}}]})


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked, running.say = [], grade
        running.url = f"http://127.0.0.1:{running.server_port}/v1"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def written(texts, context="plain"):
    return [
        Written(i, "edit", context, f"prompt {i}", "Oslo", text, False, False)
        for i, text in enumerate(texts)
    ]


def test_grades_are_the_judge_s_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    kept, judge = tmp_path / "judged.jsonl", Judge(server.url, "m")
    texts = written(["It is Oslo.", "Lima", "Oslo"])
    assert judge.cost(texts, kept).startswith("3 requests to http://127.0.0.1")
    found = judge.grade(texts, kept)
    assert [w.judged for w in found] == [True, False, True]
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert "secret" not in kept.read_text()

    assert judge.cost(texts, kept).startswith("0 requests")
    assert judge.grade(texts, kept) == found and len(server.asked) == 3
    Judge(server.url, "other").grade(texts[:1], kept)
    assert len(server.asked) == 4
    share = figures(found)
    assert share["edit_judged_plain"] == pytest.approx(200 / 3)
    assert "judged" in table(share).columns and "judged" not in table(figures(texts)).columns


def test_any_accepted_answer_is_right(server, tmp_path):
    (text,) = written(["Evelyn"])
    text = replace(text, accepted=("Evelyn", "Eva"))
    assert Judge(server.url, "m").grade([text], tmp_path / "judged.jsonl")[0].judged
    asked = server.asked[0][2]["messages"][0]["content"]
    assert "Right answer: Oslo, or as well: Evelyn, or as well: Eva\n" in asked


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [
        *((r, True) for r in ("A", "a.", "(A)", "A)", "A: right", "Answer: A", "**A**")),
        *((r, True) for r in ("A\n\nBecause it is not B.", "It is right: A")),
        *((r, False) for r in ("B", "(b)", "B: not A", "This is a wrong answer: B")),
    ],
)
def test_a_reply_is_its_first_lone_letter(server, tmp_path, recwarn, reply, is_right):
    server.say = lambda body: said(reply)
    (found,) = Judge(server.url, "m").grade(written(["Oslo"]), tmp_path / "judged.jsonl")
    assert found.judged is is_right and not recwarn


def test_replies_that_are_not_understood_are_counted(server, tmp_path):
    server.say = lambda body: said("This is a good answer.")
    kept = tmp_path / "judged.jsonl"
    with pytest.warns(UserWarning, match=r"2 of 2 replies hold no A .*judged\.jsonl has them"):
        found = Judge(server.url, "m").grade(written(["Oslo", "Lima"]), kept)
    assert [w.judged for w in found] == [False, False]


def test_what_was_answered_before_a_failure_is_kept(server, tmp_path):
    kept, judge = tmp_path / "judged.jsonl", Judge(server.url, "m")
    server.say = lambda body: grade(body) if len(server.asked) < 2 else (401, "no")
    with pytest.raises(HorseError, match=r"gave no answer \(HTTP Error 401"):
        judge.grade(written(["Oslo", "Lima"]), kept)
    server.say = grade
    with kept.open("a") as file:
        file.write('{"id": "half of a li')  # as a stop leaves it
    assert judge.cost(written(["Oslo", "Lima"]), kept).startswith("1 request to")
    assert len(judge.grade(written(["Oslo", "Lima"]), kept)) == 2
    assert judge.cost(written(["Oslo", "Lima"]), kept).startswith("0 requests")


@pytest.mark.parametrize("reply", ["{", '{"choices": []}', '{"choices": [{"message": 3}]}'])
def test_an_answer_of_another_form_is_one_line(server, tmp_path, reply):
    server.say = lambda body: (200, reply)
    with pytest.raises(HorseError, match="gave no answer"):
        Judge(server.url, "m").grade(written(["Oslo"]), tmp_path / "judged.jsonl")


def test_a_key_goes_nowhere_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    server.say = lambda body: (302, "", ("Location", f"{server.url}/elsewhere"))
    with pytest.raises(HorseError, match="gave no answer"):
        Judge(server.url, "m").grade(written(["Oslo"]), tmp_path / "judged.jsonl")
    assert [path for path, *_ in server.asked] == ["/v1/chat/completions"]
    with pytest.raises(UsageError, match="by https only"):
        Judge("http://example.org/v1", "m")
    Judge("https://example.org/v1", "m"), Judge("http://localhost:1/v1", "m")
    monkeypatch.delenv(KEY)
    Judge("http://example.org/v1", "m")
    for url in ("file:///etc/passwd", "http://[x/v1"):
        with pytest.raises(UsageError, match="is no URL"):
            Judge(url, "m")


def test_kept_answers_of_another_form_are_named(tmp_path):
    (tmp_path / "judged.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(HorseError, match=r"judged\.jsonl: damaged"):
        Judge("http://localhost:1/v1", "m").cost(written(["a"]), tmp_path / "judged.jsonl")


def test_the_command_says_the_cost_and_asks_before_it_sends_anything(server, tmp_path):
    tiny.files(tmp_path)
    line = ["eval", "--hparams", tmp_path / "tiny.yaml", "--data", tmp_path / "val.json"]
    line += ["--n-edits", "1", "--judge", server.url, "--out", tmp_path / "r.json"]

    def horse(*more, said=""):
        words = [str(word) for word in (*line, *more)]
        return CliRunner().invoke(cli.app, words, input=said)

    assert isinstance(horse().exception, UsageError) and not server.asked
    done = horse("--generate", said="n\n")
    assert "requests to http" in done.output and done.exit_code and not server.asked
    done = horse("--generate", "--yes")
    assert done.exit_code == 0 and "judged, Q&A" in done.output, done.output
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert 0 <= row["generated"]["edit_judged_qa"] <= 100
    kept = (tmp_path / "r-judged.jsonl").read_text().splitlines()
    assert len(kept) == len(server.asked) > 0
    assert "judged" in (tmp_path / "r-written.csv").read_text().splitlines()[0]
