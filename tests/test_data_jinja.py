"""Chat templates as transformers renders them, under bounds."""

import jinja2
import pytest
from tokenizer_kinds import make

from jlora.data import prompt_ids
from jlora.storage.jinja import MAX_CHARS, MAX_STEPS, Unbounded, render_template

TALK = [{"role": "user", "content": " a <b> é\n"}, {"role": "assistant", "content": "c"}]
GROW = "{{% set ns = namespace(s={start}) %}}{{% for i in range(60) %}}{{% set ns.s = {grown} %}}{{% endfor %}}{{{{ ns.s }}}}"

AS_TRANSFORMERS = {
    "loops": (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ "
        "m['role'] }}{% if not loop.last %}, {% endif %}{% endfor %}"
    ),
    "generators": "{% for r in messages | map(attribute='role') %}{{ r }}{{ loop.last }}{% endfor %}",
    "filters": (
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} "
        "{{ messages[0].content | trim | upper | replace('A', 'x') }}"
    ),
    "operators": (
        "{{ 'a' + 'b' ~ 3 ~ none ~ true }} {{ 'ab' * 3 }} {{ 2 ** 5 }} {{ '%s-%03d' % ('x', 7) }} {{ [1] + [2] }}"
    ),
    "methods": (
        "{{ 'a,b'.split(',')[-1].strip().ljust(4) }}|{{ '{} {:>4}'.format('x', 2) }}|{{ ', '.join(['a', 'b']) }}"
    ),
    "macros": (
        "{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f('a', y='b') "
        "}}{% macro g() %}<{{ caller() }}>{% endmacro %}{% call g() %}x{% endcall %}"
    ),
    "namespace": (
        "{% set ns = namespace(found=false, n=0) %}{% for m in messages "
        "%}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.found }}"
    ),
    "controls": (
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif "
        "%}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "\n  {% if true %}\n    x\n  {% endif %}\n{%- set t -%} y {{ 1 }} {% endset %}{{ t }}",
    "conditional": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% "
        "else %}none{% endfor %}{{ tools is none }}{{ x is defined }}"
    ),
    "recursive": (
        "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable "
        "%}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    "specials": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ add_generation_prompt }}",
    "dict": "{% set d = dict(a=1) %}{{ d }}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}{{ {'b': [1, none]} }}",
}


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_renders_what_transformers_does(name):
    tokenizer = make("gpt2", "a b c", chat=AS_TRANSFORMERS[name])
    variables = {
        **tokenizer.special_tokens_map,
        "messages": TALK,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render_template(AS_TRANSFORMERS[name], variables) == expected != ""


HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}" + "x" * 2000 + "{% endfor %}",
    "output of a macro": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 2000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "doubled by ~": GROW.format(start="'ab'", grown="ns.s ~ ns.s"),
    "doubled by +": GROW.format(start="'ab'", grown="ns.s + ns.s"),
    "doubled by a block": (
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}"
    ),
    "doubled in a list": GROW.format(start="['ab']", grown="[ns.s, ns.s]"),
    "doubled in a list, as JSON": GROW.format(start="['ab']", grown="[ns.s, ns.s]").replace(
        "ns.s }}", "ns.s | tojson }}"
    ),
    "doubled in a dictionary": GROW.format(start="{}", grown="{'a': ns.s, 'b': ns.s}").replace(
        "ns.s }}", "ns.s | string }}"
    ),
    "repeated": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ [1] * 10**9 }}",
    "power": "{{ 9 ** (10 ** 9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "indent": "{{ [1] | tojson(indent=10**9) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(99999) }}",
    "replace": GROW.format(start="'ab'", grown="ns.s | replace('', ns.s)"),
    "replace, as a method": GROW.format(start="'ab'", grown="ns.s.replace('', ns.s)"),
    "join": "{{ range(99999) | map('string') | join('x' * 10000) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "sorting again and again": (
        "{% set x = range(99999) | list %}{% for i in range(9999) %}{{ x | sort | length }}{% endfor %}"
    ),
    "long source": "{# " + "x" * 1_000_000 + " #}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_too_much_is_stopped(name):
    with pytest.raises(Unbounded, match="a chat template may"):
        render_template(HOSTILE[name], {"messages": TALK})


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_what_jinja_stops_itself(source):
    with pytest.raises((OverflowError, RecursionError, jinja2.UndefinedError)):
        render_template(source, {})


def test_the_sandbox_holds():
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    ):
        try:
            text = render_template(source, {"messages": [1]})
        except jinja2.exceptions.SecurityError:
            continue
        assert text == ""


def test_a_template_that_loops_is_refused_by_name():
    tokenizer = make("gpt2", "a b c", chat=HOSTILE["nested loops"])
    with pytest.raises(
        ValueError, match=rf"chat template refuses .*Unbounded: a chat template may take {MAX_STEPS:,} steps"
    ):
        prompt_ids({"instruction": "hi"}, tokenizer, template="chat")


def test_long_conversations_are_within_the_bounds():
    source = "{% for m in messages %}{{ m.role ~ ': ' + m.content | trim }}"
    source += "{% if loop.index == messages | length %}.{% endif %}\n{% endfor %}"
    messages = [{"role": "user", "content": "word " * 100}] * 3000
    text = render_template(source, {"messages": messages})
    assert len(text) == 3000 * (6 + 499) + 1 < MAX_CHARS
