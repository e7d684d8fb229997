"""Chat templates that raise anything, or never end: one line each."""

import time

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.tokens.rendering import Renderer
from tests.tiny import TOKENIZERS


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ range(10**12) }}",
        "{{ messages[0].a.b.c }}",
        "{{ " + "(" * 3000,
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_line(monkeypatch, template):
    monkeypatch.setattr("offline_lmrl.tokens.templates._SECONDS", 0.2)
    tokenizer = TOKENIZERS["chatml"]()
    tokenizer.chat_template = template
    start = time.perf_counter()
    with pytest.raises(InputError, match="^chat template: ") as refused:
        Renderer(tokenizer)
    assert "\n" not in str(refused.value) and time.perf_counter() - start < 20
