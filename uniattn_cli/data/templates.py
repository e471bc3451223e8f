"""Chat templates by name, and the one that a tokenizer without any gets.

Those here end an answer with the tokenizer's own end-of-text token, whatever it is called, because that is where
generation stops without further settings; the others of a family's own come with its tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.data.encoding import bos_of
from uniattn_cli.errors import DataError, suggest
from uniattn_cli.recipe.paths import located
from uniattn_cli.run.files import check_not_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The plainest there is: what is said to the model ends with a line end, what it says with EOS.
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
BUILTIN = {
    "plain": PLAIN,
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "tulu": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "instruction": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}


def builtin(name: str, *, bos: bool) -> str:
    """A template of `BUILTIN`, which begins with BOS if the tokenizer puts one in front of a text."""
    return ("{{ bos_token }}" if bos else "") + BUILTIN[name]


def default(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer without a chat template is given: `plain`."""
    return builtin("plain", bos=bos_of(tokenizer) is not None)


def complete(tokenizer: PreTrainedTokenizerBase) -> str:
    """Gives a tokenizer without a chat template the default one, and says so in a line for the user."""
    tokenizer.chat_template = default(tokenizer)
    return (
        "the model has no chat template: turns are concatenated without markers, answers end with "
        f"{tokenizer.eos_token}, and this template is saved with the trained model; data.chat_template sets another"
    )


def apply(tokenizer: PreTrainedTokenizerBase, setting: str | None) -> None:
    """Gives a tokenizer the template that the recipe names (`data.chat_template`); None leaves it alone.

    Raises:
        DataError: neither a name of `BUILTIN` nor a file with a template that can be read.
    """
    if setting is None:
        return
    if setting in BUILTIN:
        tokenizer.chat_template = builtin(setting, bos=bos_of(tokenizer) is not None)
        return
    path = located(setting)
    if not path.is_file():
        known = ", ".join(BUILTIN)
        raise DataError(
            f"data.chat_template: '{setting}' is neither a file (looked for {path.absolute()}) nor one of {known}"
            f"{suggest(setting, BUILTIN)}"
        )
    tokenizer.chat_template = _read(path)


def _read(path: Path) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        check_not_pointer(path, DataError)
        text = path.read_text(encoding="utf-8-sig")
        # This mark is transformers' own.
        probe = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", text)
        ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]).parse(probe)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} cannot be read: {error}") from None
    except TemplateSyntaxError as error:
        raise DataError(f"data.chat_template: {path}, line {error.lineno}: {error.message}") from None
    if "messages" not in text:
        raise DataError(f"data.chat_template: {path} is not a chat template: it does not use `messages`")
    return text
