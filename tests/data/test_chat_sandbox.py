"""Chat templates in their sandbox: what they may use, and what hostile ones come to."""

import os

import pytest

from grok.data.chat.renderer import Renderer, TemplateError

HELLO = [{"role": "user", "content": "Hello <b>"}]


def render(template: str, messages=HELLO, prompt: bool = True, **fields: str):
    now = fields.pop("now", None)
    renderer = Renderer(template, fields, now, max_seconds=0.5)
    return renderer.render(messages, prompt).text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hello <b>"),
        ("{% for m in messages %}\n  {{ m.role }}:\n{% endfor %}\nend", "  user:\nend"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <b>"}]'),
        ("{{ 'é' | tojson }}{{ {'b': 1} | tojson(indent=1) }}", '"é"{\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%d %b %Y') }}", "31 Jan 2026"),
        ("{{ 'ask' if add_generation_prompt }}{{ missing }}", "ask"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_a_template_may_use(template, text):
    assert render(template, bos_token="<s>", now="2026-01-31") == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            r"more than 0\.5 s or 1,024 MiB",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(90) }}",
            r"more than 0\.5 s or",
        ),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ ('x' * 10**6) | center(10**10) }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 16,777,216"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages[7].content }}", "has no element 7|undefined"),
    ],
)
def test_a_hostile_template_ends_with_a_sentence(template, message):
    with pytest.raises(TemplateError, match=message) as error:
        render(template)
    assert not error.value.refused
    assert "\n" not in str(error.value)


def test_what_is_no_template_is_refused_at_once():
    with pytest.raises(TemplateError, match="unexpected 'end of template' in line 2"):
        Renderer("Hello\n{% if", {})


def test_a_hostile_message_does_not_end_the_others():
    template = "{% for i in range(messages[0].n) %}{% for j in range(messages[0].n) %}{% endfor %}"
    renderer = Renderer(template + "{% endfor %}done", {}, max_seconds=0.5)
    assert renderer.render([{"n": 3}], False).text == "done"
    with pytest.raises(TemplateError, match="more than"):
        renderer.render([{"n": 99999}], False)
    assert renderer.render([{"n": 3}], False).text == "done"


def test_the_limit_is_of_all_renderings_that_a_conversation_needs():
    renderer = Renderer("{% for m in messages %}{{ m.content }}{% endfor %}", {}, max_seconds=0.5)
    talk = [{"role": "assistant", "content": "x"}] * 30_000
    with pytest.raises(TemplateError, match="more than"):
        renderer.render(talk, False)
    rendering = renderer.render(talk[:20], False)
    assert [tuple(span) for span in rendering.answers] == [(i, i + 1) for i in range(20)]
    assert rendering.lost == 0


def test_a_template_refuses_in_its_own_words():
    with pytest.raises(TemplateError, match=r"^roles must alternate$") as error:
        render("{{ raise_exception('roles must alternate') }}")
    assert error.value.refused


def test_the_process_ends_with_its_renderer():
    renderer = Renderer("x", {})
    process = renderer._process
    assert process is not None
    os.kill(process.pid, 0)
    del renderer
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
